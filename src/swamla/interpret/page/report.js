"use strict";
// All figures are in the page: nothing is loaded. The data is explain.json as it was written.
const data = JSON.parse(document.getElementById("data").textContent);
const names = data.layers.map((layer, index) => `layer ${index} (${layer.mixer})`);

// ---- what the pointer shows ---------------------------------------------------------------------------------------
const tip = document.getElementById("tip");
function showTip(text, event) {
  tip.textContent = text;
  tip.style.display = "block";
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 6)) + "px";
  tip.style.top = (event.clientY + height + 22 > innerHeight ? event.clientY - height - 10 : event.clientY + 16) + "px";
}
function hideTip() { tip.style.display = "none"; }
function figure(value) { return value === null || value === undefined ? "not measured" : Number(value.toPrecision(4)); }
function tipOf(mark) {
  if (mark.dataset.tip) return mark.dataset.tip;
  const row = mark.parentNode, map = mark.ownerSVGElement.dataset;
  if (!row.dataset.row) return "";
  const head = [...row.querySelectorAll("rect")].indexOf(mark);
  const layers = data[map.section].layers || data[map.section];
  const value = layers[row.dataset.row][map.field][head];
  return `${names[row.dataset.row]}, head ${head}\n${map.title}: ${figure(value)} (${map.unit})`;
}
addEventListener("mousemove", event => {
  const mark = event.target.closest ? event.target.closest("[data-tip], .map rect") : null;
  if (mark && !mark.closest("#explorer")) {
    const text = tipOf(mark);
    if (text) return showTip(text, event);
  }
  if (!event.target.closest || !event.target.closest("#explorer")) hideTip();
});
addEventListener("scroll", hideTip, true);

// ---- the attention of every head ----------------------------------------------------------------------------------
const explorer = document.getElementById("explorer");
if (explorer) {
  const matrix = document.getElementById("matrix"), line = document.getElementById("line");
  const tokens = document.getElementById("tokens"), status = document.getElementById("status");
  const thumbs = document.getElementById("thumbs"), choice = document.getElementById("text");
  const SIDE = 380;
  const chosen = { text: 0, layer: data.shown.layer, head: data.shown.head, query: 0 };

  // The depth of a colour is the root of |weight| over the layer's largest, so that small weights can be seen.
  function colour(weight, high) {
    const depth = Math.min(1, Math.sqrt(Math.abs(weight) / (high || 1)));
    const deep = weight < 0 ? [178, 24, 43] : [8, 64, 140];
    return deep.map(part => Math.round(255 + (part - 255) * depth));
  }
  function headsOf(layer) { return data.texts[chosen.text].layers[layer].heads; }
  function highOf(layer) { return data.texts[chosen.text].layers[layer].largest; }
  function weightOf(layer, head, query, source) {
    const found = headsOf(layer)[head], row = found.weights[query];
    return source < row.length ? row[source] * found.unit : 0;
  }
  function signed(weight) { return weight === 0 ? "0" : (weight > 0 ? "+" : "−") + Math.abs(weight).toPrecision(2); }
  function visible(token) { return token.replace(/\n/g, "⏎").replace(/\t/g, "⇥"); }

  function draw(canvas, layer, head) {
    const count = data.texts[chosen.text].tokens.length, high = highOf(layer);
    canvas.width = canvas.height = count;
    const context = canvas.getContext("2d"), picture = context.createImageData(count, count);
    for (let query = 0; query < count; query++) {
      for (let source = 0; source < count; source++) {
        const at = 4 * (query * count + source);
        const [red, green, blue] = source > query ? [243, 243, 240] : colour(weightOf(layer, head, query, source), high);
        picture.data[at] = red; picture.data[at + 1] = green; picture.data[at + 2] = blue; picture.data[at + 3] = 255;
      }
    }
    context.putImageData(picture, 0, 0);
  }
  function drawThumbs() {
    thumbs.replaceChildren();
    const most = Math.max(...data.layers.map((_, layer) => headsOf(layer).length));
    const size = Math.max(12, Math.min(88, Math.floor(312 / most) - 3, Math.floor(380 / data.layers.length) - 3));
    data.layers.forEach((about, layer) => {
      const row = document.createElement("div"), label = document.createElement("b");
      const heads = document.createElement("div");
      row.className = "row"; heads.className = "heads"; label.textContent = `${layer} ${about.mixer}`;
      headsOf(layer).forEach((_, head) => {
        const canvas = document.createElement("canvas");
        canvas.style.width = canvas.style.height = size + "px";
        canvas.dataset.layer = layer; canvas.dataset.head = head;
        canvas.setAttribute("aria-label", `${names[layer]}, head ${head}`);
        draw(canvas, layer, head);
        canvas.onclick = () => { choose({ layer, head }); };
        canvas.onmousemove = event => showTip(`${names[layer]}, head ${head}`, event);
        canvas.onmouseleave = hideTip;
        heads.append(canvas);
      });
      row.append(label, heads);
      thumbs.append(row);
    });
  }
  function writeTokens() {
    const text = data.texts[chosen.text];
    tokens.replaceChildren();
    text.tokens.forEach((token, index) => {
      const span = document.createElement("span");
      span.textContent = token.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥");
      span.dataset.index = index;
      span.onclick = () => choose({ query: index });
      span.onmousemove = event => showTip(tokenTip(index), event);
      span.onmouseleave = hideTip;
      tokens.append(span);
    });
    document.getElementById("text-note").textContent = text.note;
  }
  function edgeTip(query, source) {
    const text = data.texts[chosen.text].tokens;
    if (source > query) return `token ${source} is later than token ${query}: not seen`;
    const weight = signed(weightOf(chosen.layer, chosen.head, query, source));
    return `“${visible(text[query])}” (${query}) reads “${visible(text[source])}” (${source})\nweight ${weight}`;
  }
  function tokenTip(index) {
    const text = data.texts[chosen.text], cost = text.losses[index];
    const told = cost === null ? "" : `\nits loss: ${figure(cost)} nats`;
    if (index > chosen.query) return `“${visible(text.tokens[index])}” (${index})${told}\nclick: the token that reads`;
    return edgeTip(chosen.query, index) + told;
  }
  function refresh() {
    const text = data.texts[chosen.text], count = text.tokens.length, high = highOf(chosen.layer);
    draw(matrix, chosen.layer, chosen.head);
    const cell = SIDE / count;
    line.style.top = chosen.query * cell + "px"; line.style.height = Math.max(3, cell) + "px";
    [...tokens.children].forEach((span, index) => {
      const weight = index > chosen.query ? 0 : weightOf(chosen.layer, chosen.head, chosen.query, index);
      const shade = colour(weight, high);
      span.style.background = weight ? `rgb(${shade})` : "";
      span.style.color = index > chosen.query ? "#aaa" : shade[1] < 140 ? "#fff" : "";
      span.classList.toggle("reads", index === chosen.query);
    });
    thumbs.querySelectorAll("canvas").forEach(canvas => canvas.classList.toggle(
      "chosen", Number(canvas.dataset.layer) === chosen.layer && Number(canvas.dataset.head) === chosen.head));
    const last = headsOf(chosen.layer).length - 1;
    status.textContent =
      `${names[chosen.layer]}, head ${chosen.head} of 0–${last}; token ${chosen.query} of 0–${count - 1}: ` +
      `“${visible(text.tokens[chosen.query])}”`;
    const kind = data.layers[chosen.layer].signed
      ? "implied weights of a linear mixer: signed, rows need not sum to 1" : "softmax probabilities";
    document.getElementById("kind").textContent = kind;
    document.getElementById("low").textContent = data.layers[chosen.layer].signed ? signed(-high) : "0";
    document.getElementById("high").textContent = signed(high);
    scale(data.layers[chosen.layer].signed, high);
  }
  function scale(bothSigns, high) {
    const canvas = document.getElementById("scale");
    canvas.width = 130; canvas.height = 1;
    const context = canvas.getContext("2d"), picture = context.createImageData(130, 1);
    for (let x = 0; x < 130; x++) {
      const share = bothSigns ? (2 * x) / 129 - 1 : x / 129;
      const [red, green, blue] = colour(share * high, high);
      picture.data.set([red, green, blue, 255], 4 * x);
    }
    context.putImageData(picture, 0, 0);
  }
  function choose(changes) {
    const before = chosen.text;
    Object.assign(chosen, changes);
    chosen.layer = Math.max(0, Math.min(chosen.layer, data.layers.length - 1));
    chosen.head = Math.max(0, Math.min(chosen.head, headsOf(chosen.layer).length - 1));
    const count = data.texts[chosen.text].tokens.length;
    if (chosen.text !== before) {
      chosen.query = data.texts[chosen.text].query;
      writeTokens();
      drawThumbs();
    }
    chosen.query = Math.max(0, Math.min(chosen.query, count - 1));
    refresh();
  }
  function edgeAt(event) {
    const box = matrix.getBoundingClientRect(), count = data.texts[chosen.text].tokens.length;
    const place = (at, side) => Math.max(0, Math.min(count - 1, Math.floor((at / side) * count)));
    return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
  }
  matrix.onmousemove = event => showTip(edgeTip(...edgeAt(event)), event);
  matrix.onmouseleave = hideTip;
  matrix.onclick = event => { choose({ query: edgeAt(event)[0] }); explorer.focus({ preventScroll: true }); };
  thumbs.addEventListener("click", () => explorer.focus({ preventScroll: true }));
  choice.onchange = () => choose({ text: Number(choice.value) });
  explorer.addEventListener("keydown", event => {
    if (event.target === choice) return;
    const moves = {
      ArrowUp: { layer: chosen.layer - 1 }, ArrowDown: { layer: chosen.layer + 1 },
      ArrowLeft: { head: chosen.head - 1 }, ArrowRight: { head: chosen.head + 1 },
      ",": { query: chosen.query - 1 }, ".": { query: chosen.query + 1 },
    };
    if (moves[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      hideTip();
      choose(moves[event.key]);
    }
  });
  chosen.query = data.texts[0].query;
  writeTokens();
  drawThumbs();
  choose({});
  document.querySelectorAll(".map g[data-row] rect").forEach(rect => {
    const row = rect.parentNode;
    rect.style.cursor = "pointer";
    rect.onclick = () => choose({ layer: Number(row.dataset.row), head: [...row.querySelectorAll("rect")].indexOf(rect) });
  });
}
