// The attention maps of a report: which token looks at which. Weights come as bytes, their square
// root in steps of 1/255, rows of (meta tokens, then text tokens).
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const NAMES = { attention: "attention heads", ssm: "SSM seen as attention" };
const CELL = 6; // pixels of a weight in the map
const state = { text: 0, branch: "", layer: 0, head: 0, token: 0 };

const text = () => data.texts[state.text];
const width = () => data.meta + text().tokens.length;
const layers = () => text().branches[state.branch];
let weights = null; // of the chosen picture, null where the layer has none

function choose() {
  const pictures = layers()[state.layer];
  weights = null;
  if (pictures) {
    const raw = atob(pictures[Math.min(state.head, pictures.length - 1)]);
    weights = Uint8Array.from(raw, (c) => c.charCodeAt(0));
  }
  at("none").hidden = weights !== null;
  at("picture").hidden = weights === null;
}

const weight = (row, column) => (weights[row * width() + column] / 255) ** 2;
const percent = (w) => (w >= 0.0995 ? (100 * w).toFixed(0) : (100 * w).toFixed(1)) + "%";

// A token as it can be read: spaces, ends of lines and bytes that are no letter shown as signs.
const shown = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

function option(select, value, label) {
  const made = new Option(label, value);
  select.add(made);
}

function fill() {
  const branch = at("branch");
  branch.replaceChildren();
  for (const name of Object.keys(text().branches)) option(branch, name, NAMES[name]);
  if (!(state.branch in text().branches)) state.branch = branch.value;
  branch.value = state.branch;
  const most = Math.max(...layers().map((pictures) => (pictures ? pictures.length : 0)));
  const head = at("head");
  head.replaceChildren();
  option(head, 0, state.branch === "ssm" ? "mean of channels" : "mean of heads");
  for (let i = 1; i < most; i++) option(head, i, `head ${i - 1}`);
  state.head = Math.min(state.head, most - 1);
  head.value = state.head;
  at("layer").max = layers().length - 1;
  at("layer").value = state.layer;
  tokens();
}

function tokens() {
  const list = at("tokens");
  list.replaceChildren();
  text().tokens.forEach((token, i) => {
    const made = document.createElement("span");
    made.textContent = shown(token);
    made.id = `token-${i}`;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.setAttribute("aria-label", `token ${i}: ${token.trim() || shown(token)}`);
    made.tabIndex = -1;
    list.append(made);
    if (token.includes("\n")) list.append(document.createElement("i"));
  });
  at("meta").replaceChildren(
    ...Array.from({ length: data.meta }, (_, i) => {
      const made = document.createElement("span");
      made.textContent = i;
      return made;
    }),
  );
  at("meta").hidden = at("meta-name").hidden = data.meta === 0;
  state.token = Math.min(state.token, text().tokens.length - 1);
}

function paint(span, w) {
  span.style.setProperty("--w", Math.sqrt(w).toFixed(3));
  span.classList.toggle("strong", Math.sqrt(w) > 0.55);
  span.title = percent(w);
}

function colour() {
  const window_ = data.windows[state.layer];
  const sees = state.branch === "ssm" ? "" : window_ === null ? ", sees everything" : `, window ${window_}`;
  at("layer-name").textContent = `layer ${state.layer} of ${layers().length}${sees}`;
  at("layer").setAttribute("aria-valuetext", at("layer-name").textContent);
  if (!weights) return;
  const row = state.token;
  const spans = [...at("tokens").querySelectorAll("span")];
  [...at("meta").children].forEach((span, i) => paint(span, weight(row, i)));
  spans.forEach((span, i) => {
    paint(span, weight(row, data.meta + i));
    span.setAttribute("aria-selected", String(i === row));
    span.tabIndex = i === row ? 0 : -1;
  });
  say(row);
}

function say(row) {
  const found = Array.from({ length: row + 1 }, (_, i) => [weight(row, data.meta + i), i]);
  found.sort((a, b) => b[0] - a[0]);
  let meta = 0;
  for (let i = 0; i < data.meta; i++) meta += weight(row, i);
  const best = found.slice(0, 4).map(([w, i]) => `“${shown(text().tokens[i])}” (${i}) ${percent(w)}`);
  const first = data.meta ? `meta tokens ${percent(meta)}; ` : "";
  at("said").textContent = `Token ${row} “${shown(text().tokens[row])}” looks at: ${first}${best.join(", ")}.`;
}

function map() {
  if (!weights) return;
  const canvas = at("map"), rows = text().tokens.length, columns = width();
  canvas.width = columns * CELL;
  canvas.height = rows * CELL;
  const draw = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  draw.fillStyle = style.getPropertyValue("--raised");
  draw.fillRect(0, 0, canvas.width, canvas.height);
  const ink = style.getPropertyValue("--heat");
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const w = weights[r * columns + c];
      if (!w) continue;
      draw.fillStyle = `rgba(${ink}, ${w / 255})`;
      draw.fillRect(c * CELL, r * CELL, CELL, CELL);
    }
  }
  draw.strokeStyle = style.getPropertyValue("--faint");
  if (data.meta) draw.strokeRect(data.meta * CELL - 0.5, 0, 0, canvas.height);
  draw.strokeStyle = style.getPropertyValue("--bad");
  draw.strokeRect(0.5, state.token * CELL + 0.5, canvas.width - 1, CELL);
}

function show() {
  choose();
  colour();
  map();
}

function look(token, focus = false) {
  state.token = Math.max(0, Math.min(text().tokens.length - 1, token));
  colour();
  map();
  if (focus) at(`token-${state.token}`).focus();
}

const change = { text: Number, branch: String, head: Number, layer: Number };
for (const [id, read] of Object.entries(change)) {
  at(id).addEventListener("input", () => {
    state[id] = read(at(id).value);
    if (id === "text" || id === "branch") fill();
    show();
  });
}
at("controls").addEventListener("submit", (event) => event.preventDefault());

const number = (target) => {
  const span = target.closest?.("#tokens span");
  return span ? Number(span.id.slice("token-".length)) : null;
};
for (const kind of ["mouseover", "focusin", "click"]) {
  at("tokens").addEventListener(kind, (event) => {
    const token = number(event.target);
    if (token !== null && token !== state.token) look(token);
  });
}
at("tokens").addEventListener("keydown", (event) => {
  const far = text().tokens.length;
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -far, End: far };
  const turns = { PageDown: 1, PageUp: -1 };
  if (event.key in steps) look(state.token + steps[event.key], true);
  else if (event.key in turns) {
    state.layer = Math.max(0, Math.min(layers().length - 1, state.layer + turns[event.key]));
    at("layer").value = state.layer;
    show();
    if (weights) at(`token-${state.token}`).focus();
    else at("layer").focus();
  } else return;
  event.preventDefault();
});
at("map").addEventListener("mousemove", (event) => look(Math.floor(event.offsetY / CELL)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", map);

data.texts.forEach((one, i) => option(at("text"), i, one.name));
fill();
state.token = text().tokens.length - 1;
show();
