
// ---- the attention of an answer: what one of its tokens reads of every earlier one, in one layer and head ----------
const DEPTH = 0.55;  // of the deepest colour, on which text is still easy to read
const STRONGEST = 8;  // tokens in the table
// ids: of the text, of which `start` are the prompt.  found: what the server says of the token `found.token`.
// wanted: the token that is to read.  hovered: the token under the mouse.
const seen = { side: null, ids: [], start: 0, found: null, wanted: 0, asking: false, hovered: -1 };

async function toggleAttention(side) {
  if (seen.side === side) return closeAttention();
  const drawn = openAttention(side);
  $("layer").focus({ preventScroll: true });
  await drawn;
  $("attention").scrollIntoView({ block: "nearest" });
}

function openAttention(side) {
  const all = [...side.ids.prompt, ...side.ids.answer];
  const most = models.find((model) => model.id === side.model).swamla.explained_tokens;
  Object.assign(seen, { side, ids: all.slice(0, most), start: side.ids.prompt.length, found: null });
  for (const each of sides) each.seeEl.setAttribute("aria-pressed", each === side);
  $("attention-name").textContent = `Attention of ${side.model}`;
  $("cut").textContent = all.length > most ? `Only the first ${most} of ${all.length} tokens are explained.` : "";
  $("attention").hidden = false;
  return letRead(seen.ids.length - 1);
}

function closeAttention() {
  Object.assign(seen, { side: null, ids: [], found: null });
  for (const each of sides) each.seeEl.setAttribute("aria-pressed", "false");
  $("attention").hidden = true;
}

// One request at a time: keys that are pressed meanwhile only change what is asked next.
async function letRead(token) {
  seen.wanted = token;
  if (seen.asking) return;
  seen.asking = true;
  while (seen.side && seen.found?.token !== seen.wanted) {
    const { side, ids, wanted } = seen;
    let found = null, problem = "";
    try {
      const body = JSON.stringify({ model: side.model, prompt: ids, token: wanted });
      const response = await fetch("/v1/explain", { method: "POST", headers: headers(), body });
      const answer = await response.json();
      if (response.ok) found = answer;
      else problem = answer.error.message;
    } catch (error) {
      problem = `The server does not answer: ${error.message}`;
    }
    if (seen.ids !== ids) continue;  // another answer was asked for meanwhile
    $("attention-error").textContent = problem;
    $("attention-error").hidden = !problem;
    if (problem) break;
    const first = !seen.found;
    seen.found = found;
    if (first) drawText();
    drawWeights();
  }
  seen.asking = false;
}

function drawText() {
  const names = seen.found.layers.map((layer, index) => {
    return `${index}: ${layer.block === layer.mixer ? layer.mixer : `${layer.block} (${layer.mixer})`}`;
  });
  fill($("layer"), names);
  const parts = seen.found.tokens.map((token, index) => {
    const span = element("span", token.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥"), "token");
    span.dataset.index = index;
    return span;
  });
  const answer = parts.splice(seen.start);
  $("reads").replaceChildren(element("span", "Prompt", "who"), ...parts);
  if (answer.length) $("reads").append(element("span", "Answer", "who"), ...answer);
  seen.hovered = -1;
}

// The options of a choice; what was chosen stays, as far as there is such a number.
function fill(select, names) {
  const before = Math.max(0, select.selectedIndex);
  select.replaceChildren(...names.map((name, index) => new Option(name, index)));
  select.selectedIndex = Math.min(before, names.length - 1);
}

const chosenLayer = () => seen.found.layers[$("layer").selectedIndex];
const chosenRow = () => chosenLayer().heads[$("head").selectedIndex];
const quoted = (index) => `“${shown(seen.found.tokens[index])}” (${index})`;
function figure(weight) {
  if (weight === null) return "no number";
  if (!weight) return "0";
  return (weight < 0 ? "−" : chosenLayer().signed ? "+" : "") + Math.abs(weight).toPrecision(3);
}
// The depth of a colour is the root of |weight| over the largest of the layer's heads, so that small ones can be seen.
const depthOf = (share) => DEPTH * Math.sqrt(Math.min(1, Math.abs(share)));
const colourOf = (share) => `rgb(var(${share < 0 ? "--minus" : "--plus"}) / ${depthOf(share).toFixed(3)})`;

function drawWeights() {
  fill($("head"), chosenLayer().heads.map((_, head) => `${head}`));
  const layer = chosenLayer(), row = chosenRow(), token = seen.found.token;
  const high = layer.heads.flat().reduce((most, weight) => Math.max(most, Math.abs(weight)), 0) || 1;
  for (const span of $("reads").querySelectorAll(".token")) {
    const index = Number(span.dataset.index), weight = row[index] || 0;
    span.style.background = weight ? colourOf(weight / high) : "";
    span.classList.toggle("minus", weight < 0);
    span.classList.toggle("later", index > token);
    span.classList.toggle("chosen", index === token);
  }
  $("kind").textContent = layer.signed
    ? "implied weights of a linear mixer: signed (below 0 red and dotted), their sum is not 1"
    : "none below 0, as softmax probabilities are";
  $("low").textContent = layer.signed ? figure(-high) : "0";
  $("high").textContent = figure(high);
  const stops = Array.from({ length: 25 }, (_, step) => colourOf(layer.signed ? step / 12 - 1 : step / 24));
  $("scale").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  drawStrongest(row, token, layer);
  tellHovered();
}

function drawStrongest(row, token, layer) {
  const order = row.map((weight, index) => [weight || 0, index]).sort((one, other) => Math.abs(other[0]) - Math.abs(one[0]));
  const strongest = order.slice(0, STRONGEST), most = Math.abs(strongest[0][0]) || 1;
  const table = element("table");
  table.append(element("caption", `What ${quoted(token)} reads most, of ${row.length} tokens`));
  for (const [weight, index] of strongest) {
    const line = element("tr"), head = element("th", quoted(index)), bar = element("td", "", "bar"), filled = element("span");
    head.scope = "row";
    const share = (100 * Math.abs(weight)) / most / (layer.signed ? 2 : 1);
    filled.style.width = `${share}%`;
    filled.style.marginLeft = layer.signed ? `${weight < 0 ? 50 - share : 50}%` : "0";
    filled.style.background = `rgb(var(${weight < 0 ? "--minus" : "--plus"}))`;
    bar.append(filled);
    bar.setAttribute("aria-hidden", "true");
    line.append(head, element("td", figure(weight), "number"), bar);
    table.append(line);
  }
  $("strongest").replaceChildren(table);
  const place = `Layer ${$("layer").selectedIndex} (${layer.mixer}), head ${$("head").selectedIndex} of ${layer.heads.length}`;
  $("reading").textContent = `${place}: ${quoted(token)} reads most of ${quoted(strongest[0][1])}, ${figure(strongest[0][0])}.`;
}

function tellHovered() {
  const index = seen.hovered, token = seen.found.token;
  if (index < 0) $("edge").textContent = "";
  else if (index > token) $("edge").textContent = `${quoted(index)} is later than ${quoted(token)}, which does not see it`;
  else $("edge").textContent = `${quoted(token)} reads ${quoted(index)}: ${figure(chosenRow()[index])}`;
}

$("reads").addEventListener("mouseover", (event) => {
  if (!seen.found || !event.target.dataset.index) return;
  seen.hovered = Number(event.target.dataset.index);
  tellHovered();
});
$("reads").addEventListener("click", (event) => {
  if (event.target.dataset.index) letRead(Number(event.target.dataset.index));
});
$("reads").addEventListener("keydown", (event) => {
  if (!(event.key in MOVES) || !seen.found) return;
  event.preventDefault();
  letRead(Math.max(0, Math.min(seen.ids.length - 1, seen.wanted + MOVES[event.key])));
  $("reads").querySelector(`[data-index="${seen.wanted}"]`).scrollIntoView({ block: "nearest" });
});
for (const name of ["layer", "head"]) $(name).addEventListener("change", drawWeights);
