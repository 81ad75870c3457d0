"use strict";
const $ = (id) => document.getElementById(id);
const ALTERNATIVES = 5;
const MOVES = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
const sides = [0, 1].map(makeSide);
let models = [], running = null;

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function makeSide(number) {
  const root = $("side").content.cloneNode(true).firstElementChild;
  $("sides").append(root);
  const side = { number, root, history: [], tokens: [], chosen: -1, ids: null };
  for (const name of ["text", "error", "figures", "see", "tokens"]) side[`${name}El`] = root.querySelector(`.${name}`);
  root.querySelector("h2").id = `side-${number}`;
  root.setAttribute("aria-labelledby", `side-${number}`);
  side.seeEl.addEventListener("click", () => toggleAttention(side));
  side.textEl.addEventListener("keydown", (event) => onArrow(side, event));
  side.textEl.addEventListener("mouseover", (event) => {
    const found = side.tokens.findIndex((token) => token.span === event.target);
    if (found >= 0) choose(side, found);
  });
  return side;
}

function headers() {
  const found = { "content-type": "application/json" };
  if ($("key").value) found.authorization = `Bearer ${$("key").value}`;
  return found;
}

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.status === 401) {
      $("key-field").hidden = false;
      return say("This server asks for an API key.");
    }
    models = (await response.json()).data;
  } catch (error) {
    return say("The server does not answer.");
  }
  for (const number of [0, 1]) {
    const select = $(`model-${number}`);
    select.replaceChildren(...(number ? [new Option("none", "")] : []), ...models.map((model) => new Option(model.id, model.id)));
    if (number && models.length > 1) select.value = models[1].id;
  }
  say("");
  modelsChanged();
}

function chosenModels() {
  return [0, 1].map((number) => models.find((model) => model.id === $(`model-${number}`).value));
}

function modelsChanged() {
  const chosen = chosenModels();
  const canChat = chosen.some(Boolean) && chosen.every((model) => !model || model.swamla.chat);
  $("chat").disabled = !canChat;
  $("no-chat").hidden = canChat;
  if (!canChat) document.querySelector("[name=mode][value=text]").checked = true;
  sides.forEach((side, number) => {
    const model = chosen[number];
    side.root.hidden = !model;
    if (!model || side.model === model.id) return;
    side.model = model.id;
    side.root.querySelector("h2").textContent = model.id;
    side.textEl.setAttribute("aria-label", `Answer of ${model.id}`);
    side.figuresEl.textContent = 
      `${model.swamla.pattern}; at most ${model.swamla.max_tokens} tokens${model.swamla.decoding === "int8" ? "; weights of 8 bits" : ""}`;
    clear(side);
  });
  modeChanged();
}

const isChat = () => $("chat").checked;
function modeChanged() { $("prompt-name").textContent = isChat() ? "Your message" : "Prompt"; }
function say(text) { $("status").textContent = text; }

function reset(side) {
  side.history = [];
  side.tokens = [];
  side.chosen = -1;
  side.textEl.replaceChildren();
  side.tokensEl.replaceChildren();
  side.errorEl.hidden = true;
  side.ids = { prompt: [], answer: [] };
  side.seeEl.hidden = true;
}

// What is being written ends, on both sides: it would go on in an emptied place.
function clear(side) {
  if (running) running.abort();
  reset(side);
  if (seen.side === side) closeAttention();
}

async function write() {
  if (running) return;
  const active = sides.filter((side, number) => chosenModels()[number]);
  if (!active.length) return;
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  running = new AbortController();
  $("halt").disabled = false;
  $("write").disabled = true;
  say(`Writing with seed ${seed} …`);
  const prompt = $("prompt").value;
  if (isChat()) $("prompt").value = "";
  await Promise.all(active.map((side) => answer(side, prompt, seed, running.signal)));
  const stopped = running.signal.aborted;
  running = null;
  $("halt").disabled = true;
  $("write").disabled = false;
  say(`${stopped ? "Stopped" : "Done"}, seed ${seed}.`);
  const spoken = active.map((side) => ` ${side.model}: ${side.figuresEl.textContent}.`).join("");
  $("status").append(element("span", spoken, "hidden"));  // others see it below the answers
}

function bodyOf(side, prompt, seed) {
  const body = { model: side.model, seed, stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k"]) body[name] = Number($(name).value);
  if ($("stop").value) body.stop = $("stop").value;
  if (!isChat()) return { ...body, prompt, logprobs: ALTERNATIVES };
  return { ...body, messages: side.history, logprobs: true, top_logprobs: ALTERNATIVES };
}

async function answer(side, prompt, seed, signal) {
  side.errorEl.hidden = true;
  side.ids = { prompt: [], answer: [] };
  side.seeEl.hidden = true;
  const chat = isChat();
  if (chat) {
    side.history.push({ role: "user", content: prompt });
    side.textEl.append(said("You", prompt));
    side.target = said(side.model, "");
    side.textEl.append(side.target);
    side.textEl.scrollTop = side.textEl.scrollHeight;
  } else {
    reset(side);
    side.textEl.append(element("span", prompt, "prompt"));
    side.target = side.textEl;
  }
  side.root.classList.add("busy");
  side.textEl.setAttribute("aria-busy", "true");
  const written = { text: "", first: 0, last: 0, count: 0, usage: null };
  const history = side.history;
  try {
    const path = chat ? "/v1/chat/completions" : "/v1/completions";
    const response = await fetch(path, { method: "POST", headers: headers(), signal, body: JSON.stringify(bodyOf(side, prompt, seed)) });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (signal.aborted) break;
      take(side, written, event);
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(side, error.message);
  }
  side.root.classList.remove("busy");
  side.textEl.setAttribute("aria-busy", "false");
  if (side.history !== history) return;  // cleared meanwhile
  if (chat && !side.errorEl.hidden && !written.text) history.pop();  // what the server refused would be refused again
  else if (chat) history.push({ role: "assistant", content: written.text });
  showFigures(side, written);
  const explains = side.ids.answer.length > 0;
  side.seeEl.hidden = !explains;
  if (seen.side === side) explains ? openAttention(side) : closeAttention();
}

function said(who, text) {
  const block = element("span", "", "said");
  block.append(element("span", who, "who"), text);
  return block;
}

function fail(side, message) {
  side.errorEl.textContent = message;
  side.errorEl.hidden = false;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(side, written, event) {
  if (event.error) return fail(side, event.error.message);
  if (event.usage) written.usage = event.usage;
  for (const choice of event.choices) {
    if (choice.prompt_token_ids) side.ids.prompt = choice.prompt_token_ids;
    side.ids.answer.push(...(choice.token_ids || []));
    const text = choice.delta ? choice.delta.content || "" : choice.text;
    const told = tokensOf(choice.logprobs);
    const names = told.map((token) => token.name).join("");
    const follow = side.textEl.scrollTop + side.textEl.clientHeight > side.textEl.scrollHeight - 30;
    told.forEach((token, index) => {
      token.text = names === text ? token.name : index === told.length - 1 ? text : "";
      addToken(side, token);
    });
    if (!told.length && text) side.target.append(text);
    written.text += text;
    written.count += told.length;
    if (told.length) { written.first ||= performance.now(); written.last = performance.now(); }
    if (follow) side.textEl.scrollTop = side.textEl.scrollHeight;
  }
  showFigures(side, written);
}

function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((each) => ({ name: each.token, logp: each.logprob, top: each.top_logprobs.map((one) => [one.token, one.logprob]) }));
  }
  return logprobs.tokens.map((name, index) => ({ name, logp: logprobs.token_logprobs[index], top: Object.entries(logprobs.top_logprobs[index]) }));
}

function addToken(side, token) {
  token.span = element("span", token.text, "token");
  shade(token);
  side.target.append(token.span);
  side.tokens.push(token);
}

function shade(token) {
  const doubt = $("shade").checked ? Math.min(1, -token.logp / 8) * 0.55 : 0;
  token.span.style.background = doubt > 0.02 ? `rgb(var(--shade) / ${doubt.toFixed(2)})` : "";
}

function showFigures(side, written) {
  const extra = written.usage && written.usage.swamla;
  const seconds = (written.last - written.first) / 1000;
  const rate = extra ? extra.tokens_per_second : seconds > 0 ? (written.count - 1) / seconds : 0;
  const figures = [`${written.usage ? written.usage.completion_tokens : written.count} tokens`, `${rate.toFixed(1)} tokens/s`];
  if (extra) {
    figures.push(`first token after ${extra.seconds_to_first_token.toFixed(2)} s`);
    figures.push(`state ${extra.state_bytes.toLocaleString("en")} bytes`);
    const cached = written.usage.prompt_tokens_details.cached_tokens;
    figures.push(`prompt ${written.usage.prompt_tokens} tokens${cached ? `, ${cached} cached` : ""}`);
  }
  side.figuresEl.textContent = figures.join("; ");
}

function onArrow(side, event) {
  if (!(event.key in MOVES) || !side.tokens.length) return;
  event.preventDefault();
  choose(side, Math.max(0, Math.min(side.tokens.length - 1, side.chosen + MOVES[event.key])));
  side.tokens[side.chosen].span.scrollIntoView({ block: "nearest" });
}

function choose(side, index) {
  if (side.chosen >= 0 && side.tokens[side.chosen]) side.tokens[side.chosen].span.classList.remove("chosen");
  side.chosen = index;
  const token = side.tokens[index];
  token.span.classList.add("chosen");
  const table = element("table");
  table.append(element("caption", `Token ${index + 1} of ${side.tokens.length}: ${shown(token.name)}, probability ${percent(token.logp)}`));
  for (const [name, logp] of [...token.top].sort((one, other) => other[1] - one[1])) {
    const row = element("tr"), bar = element("td", "", "bar"), filled = element("span");
    const head = element("th", shown(name) + (name === token.name ? " ←" : ""));
    head.scope = "row";
    filled.style.width = `${100 * Math.exp(logp)}%`;
    bar.append(filled);
    bar.setAttribute("aria-hidden", "true");
    row.append(head, element("td", percent(logp), "number"), bar);
    table.append(row);
  }
  side.tokensEl.replaceChildren(table);
}

const shown = (name) => JSON.stringify(name).slice(1, -1).replace(/ /g, "␣") || "(empty)";
const percent = (logp) => `${(100 * Math.exp(logp)).toFixed(logp < -4.6 ? 3 : 1)} %`;

$("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("halt").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => { sides.forEach(clear); say(""); $("prompt").focus(); });
$("shade").addEventListener("change", () => sides.forEach((side) => side.tokens.forEach(shade)));
$("key").addEventListener("change", loadModels);
for (const number of [0, 1]) $(`model-${number}`).addEventListener("change", modelsChanged);
for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", () => { sides.forEach(clear); modeChanged(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("form").reportValidity()) { event.preventDefault(); write(); }
});
loadModels();
