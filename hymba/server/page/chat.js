// The chat page. The conversation is `turns`, kept in localStorage; everything seen is drawn from it.
// A turn is {role: "user" | "assistant", content, facts?}; facts is the small line under an answer.

import { answer, ask, Problem, short, size, Watch } from "./wire.js";

const DEFAULTS = { system: "", temperature: "0.7", top_p: "0.95", max_tokens: "512", seed: "" };
const SPOKEN = 1000; // characters of an answer that are read aloud when it is there
const POLL = { well: 1000, ill: 3000 }; // milliseconds between looks at /stats

const $ = (id) => document.getElementById(id);
const log = $("log");
const message = $("message");

let turns = [];
let settings = { ...DEFAULTS };
let asking = null; // the AbortController of the answer that is coming
let following = true; // is the reader at the end of the conversation?
let model; // the server's name of it, once met
let met = false;

// ---- what is kept: turns and settings in this browser, the key in this tab

function recall(store, name, otherwise) {
  try {
    return JSON.parse(store.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // not ours, or storage is forbidden
  }
}

function keep(store, name, value) {
  try {
    store.setItem(name, JSON.stringify(value));
  } catch {
    notice("This browser does not keep the conversation: its storage is full or switched off.");
  }
}

const keepTurns = () => keep(localStorage, "hymba.turns", turns);
const key = () => recall(sessionStorage, "hymba.key", "");

function recallTurns() {
  const found = recall(localStorage, "hymba.turns", []);
  const whole = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string" && turn.content;
  turns = Array.isArray(found) ? found.filter(whole) : [];
}

// ---- drawing. Text of a model becomes text nodes and nothing else.

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(label, act) {
  const node = make("button", "bare", label);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function drawTurns() {
  log.querySelectorAll(".turn").forEach((node) => node.remove());
  turns.forEach((turn) => log.append(drawTurn(turn)));
  drawUnder();
  $("empty").hidden = turns.length > 0;
  toEnd();
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

function drawTurn(turn) {
  const node = make("article", `turn ${turn.role}`);
  const body = make("div", "text");
  node.append(make("h2", "unseen", turn.role === "user" ? "You" : "Answer"), body);
  drawText(body, turn);
  return node;
}

/** Draw a turn's text, touching only what is new: an answer's beginning stays selected. */
function drawText(body, turn) {
  const parts = turn.role === "user" ? [{ text: turn.content }] : pieces(turn.content);
  parts.forEach((part, i) => {
    let node = body.children[i];
    if (node && node.matches(".code") !== (part.code !== undefined)) {
      while (body.children[i]) body.lastChild.remove();
      node = null;
    }
    if (!node) body.append((node = part.code === undefined ? make("div", "said") : drawCode(part)));
    const target = node.matches(".code") ? node.querySelector("code") : node;
    const text = part.code ?? part.text;
    const shown = target.firstChild?.data ?? "";
    if (shown && text.startsWith(shown)) target.firstChild.appendData(text.slice(shown.length));
    else target.textContent = text;
  });
  while (body.children.length > parts.length) body.lastChild.remove();
}

/** Plain text and fenced code, in order. A fence that is still open runs to the end. */
function pieces(content) {
  const found = [];
  const fence = /^ {0,3}```([^\n`]*)\n([^]*?)(?:^ {0,3}```[ \t]*(?:\n|$)|(?![^]))/gm;
  let end = 0;
  for (const { 0: whole, 1: language, 2: code, index } of content.matchAll(fence)) {
    if (content.slice(end, index).trim()) found.push({ text: content.slice(end, index).trimEnd() });
    found.push({ code: code.replace(/\n$/, ""), language: language.trim() });
    end = index + whole.length;
  }
  if (content.slice(end).trim()) found.push({ text: content.slice(end).replace(/\n+$/, "") });
  for (const part of found) part.text = part.text?.replace(/^\n+/, "");
  return found;
}

function drawCode(part) {
  const node = make("div", "code");
  const head = make("div");
  const copy = button("Copy code", () => copyText(node.querySelector("code").textContent, copy));
  head.append(make("span", "", part.language), copy);
  const block = make("pre");
  block.tabIndex = 0; // it scrolls sideways
  block.setAttribute("role", "region");
  block.setAttribute("aria-label", part.language ? `Code, ${part.language}` : "Code");
  block.append(make("code"));
  node.append(head, block);
  return node;
}

/** The line under each finished answer: copy, and for the last one another try; facts. */
function drawUnder() {
  const nodes = log.querySelectorAll(".turn");
  turns.forEach((turn, i) => {
    const last = i === turns.length - 1;
    if (turn.role !== "assistant" || (asking && last)) return;
    const old = nodes[i].querySelector(".under");
    if (old?.dataset.last === String(last && !asking)) return; // it may hold the focus
    old?.remove();
    nodes[i].append(drawLine(turn, last && !asking));
  });
}

function drawLine(turn, last) {
  const line = make("div", "under");
  line.dataset.last = last;
  const copy = button("Copy", () => copyText(turn.content, copy));
  copy.setAttribute("aria-label", "Copy answer");
  line.append(copy);
  if (last) {
    const again = button("Regenerate", regenerate);
    again.setAttribute("aria-label", "Regenerate answer");
    line.append(again);
  }
  if (turn.facts) line.append(make("span", "facts", turn.facts));
  return line;
}

// ---- saying things

const say = (text) => ($("spoken").textContent = text);

function notice(text, label, act) {
  $("notice-text").textContent = text;
  $("notice-action").hidden = !act;
  $("notice-action").textContent = label ?? "";
  $("notice-action").onclick = act ?? null;
  $("notice").hidden = false;
}

function complain(problem) {
  $("error-text").textContent = problem.message;
  $("error-settings").hidden = problem.kind !== "key";
  $("retry").hidden = turns.length === 0;
  $("error").hidden = false;
}

function quiet() {
  $("notice").hidden = $("error").hidden = true;
}

async function copyText(text, control) {
  const before = control.textContent;
  try {
    await navigator.clipboard.writeText(text);
    control.textContent = "Copied";
    say("Copied.");
  } catch {
    // Browsers offer the clipboard to https and this machine alone.
    control.textContent = copyOldWay(text, control) ? "Copied" : "Not copied";
    say(control.textContent);
  }
  setTimeout(() => (control.textContent = before), 1500);
}

function copyOldWay(text, control) {
  const box = make("textarea", "unseen");
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  control.focus();
  return done;
}

// ---- asking

function request() {
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content } of turns) {
    // A question without an answer joins the next one: templates want the roles to alternate.
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  const body = { model, messages };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  return body;
}

/** Send what is in the message box. */
function send() {
  const text = message.value; // as it is: a model that continues text cares for every space
  if (asking) return;
  if (!text.trim()) return message.focus();
  message.value = "";
  fit();
  turns.push({ role: "user", content: text });
  drawTurns();
  keepTurns();
  reply();
}

/** Ask for the last answer anew; the old one comes back if there is none. */
function regenerate() {
  if (asking || !turns.length) return;
  const old = turns.at(-1).role === "assistant" ? turns.pop() : null;
  drawTurns();
  reply(old);
}

async function reply(old = null) {
  const turn = { role: "assistant", content: "" };
  const watch = new Watch();
  const limit = Number(settings.max_tokens);
  let finish = "";
  let usage = null;
  let problem = null;
  asking = new AbortController();
  const node = begin(turn);
  try {
    if (!met) await meet();
    const body = request();
    turns.push(turn);
    const draw = painter(node.querySelector(".text"), turn);
    for await (const piece of answer(body, key(), asking.signal)) {
      finish = piece.finish ?? finish;
      usage = piece.usage ?? usage;
      if (!piece.text) continue;
      turn.content += piece.text;
      watch.tick();
      draw();
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else [problem, finish] = [error, "broken off"];
  }
  turn.facts = watch.facts(finish, usage, limit);
  if (!turn.content && (problem || finish === "stopped")) {
    turns = turns.filter((other) => other !== turn);
    if (old && turns.length) turns.push(old);
  }
  end(turn, node, finish, problem);
}

function begin(turn) {
  const node = drawTurn(turn);
  node.classList.add("growing");
  log.append(node);
  drawUnder();
  quiet();
  busy(true);
  say("The answer is coming.");
  toEnd();
  return node;
}

function end(turn, node, finish, problem) {
  asking = null;
  if (turns.includes(turn)) {
    node.classList.remove("growing");
    drawText(node.querySelector(".text"), turn);
    drawUnder();
  } else drawTurns();
  if (following) toEnd();
  busy(false);
  keepTurns();
  if (problem) return complain(problem);
  if (finish === "stopped") {
    say("The answer was stopped.");
    if (turns.at(-1)?.role === "user") notice("Stopped before the first word.", "Try again", regenerate);
    return;
  }
  const said = turn.content.length > SPOKEN ? `${turn.content.slice(0, SPOKEN)} …` : turn.content;
  say(said || "The answer is empty.");
}

/** Draw at most once a frame, and follow the end only while the reader is there. */
function painter(body, turn) {
  let waiting = false;
  let kept = performance.now();
  return () => {
    if (waiting) return;
    waiting = true;
    // A hidden tab has no frames; drawing there can wait, the text does not.
    requestAnimationFrame(() => {
      waiting = false;
      drawText(body, turn);
      if (following) toEnd();
    });
    if (performance.now() - kept < 1000) return;
    kept = performance.now();
    keepTurns();
  };
}

/** Show Stop in place of Send. A focus on one goes to the other, never to nowhere. */
function busy(on) {
  const [shown, gone] = on ? [$("stop"), $("send")] : [$("send"), $("stop")];
  shown.hidden = false;
  gone.hidden = true;
  log.setAttribute("aria-busy", String(on));
  const focus = document.activeElement;
  if (focus !== document.body && !focus.closest("[hidden]")) return;
  // A finger's focus stays off the message box: the phone's keyboard would cover the answer.
  (on || matchMedia("(pointer: coarse)").matches ? shown : message).focus();
}

const stop = () => asking?.abort();

// ---- the chat as a whole

function startAnew() {
  const old = turns;
  stop();
  turns = [];
  drawTurns();
  keepTurns();
  quiet();
  if (old.length) {
    notice("A new chat. The old one is gone from this browser.", "Undo", () => {
      turns = old.filter((turn) => turn.content);
      drawTurns();
      keepTurns();
      quiet();
      message.focus();
    });
  }
  message.focus();
}

function exportChat() {
  if (!turns.length) return notice("There is no conversation to export yet.");
  const content = JSON.stringify({ exported: new Date().toISOString(), ...request() }, null, 2);
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([content + "\n"], { type: "application/json" }));
  link.download = `hymba-chat-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  say("The conversation is exported.");
}

// ---- settings

function showSettings() {
  for (const name of Object.keys(DEFAULTS)) $(name).value = settings[name];
  $("key").value = key();
  $("settings").showModal();
}

/** Take over what is valid; a field that is not keeps its old value. */
function takeSettings() {
  for (const name of Object.keys(DEFAULTS)) {
    if ($(name).validity.valid) settings[name] = $(name).value;
  }
  keep(localStorage, "hymba.settings", settings);
  keep(sessionStorage, "hymba.key", $("key").value.trim());
  look();
}

// ---- the server, live

let timer = 0;

async function look() {
  clearTimeout(timer);
  if (document.visibilityState === "hidden") return;
  let wait = POLL.well;
  try {
    if (!met) await meet();
    const stats = await ask("stats", key());
    show(stats);
    health(stats.status === "ready" ? "ready" : "waiting", stats.status);
  } catch (problem) {
    wait = POLL.ill;
    if (problem.kind === "key") health("waiting", "wants an API key");
    else if (problem.kind === "busy") health("waiting", "busy");
    else health("gone", problem.kind === "gone" ? "not answering" : "not understood");
    if (problem.kind === "gone") met = false; // another model may come back
  }
  clearTimeout(timer);
  timer = setTimeout(look, wait);
}

async function meet() {
  const found = await ask("v1/models", key());
  if (!found.data?.[0]?.id) throw new Problem("refused", "The server names no model.");
  model = found.data[0].id;
  met = true;
  $("model").textContent = model;
  document.title = `${model} · hymba`;
}

function health(state, words) {
  if ($("health").textContent === words) return;
  $("health").dataset.state = state;
  $("health").textContent = words;
  $("live").hidden = state === "gone";
}

function show(stats) {
  $("plain").hidden = stats.chat_template;
  $("cache").textContent = `${size(stats.cache_bytes)} of ${size(stats.cache_bytes_total)}`;
  $("cache-meter").value = stats.cache_bytes_total ? stats.cache_bytes / stats.cache_bytes_total : 0;
  $("speed").textContent = `${short(stats.tokens_per_second ?? 0)} tokens/s`;
  $("requests").textContent = `${stats.running} running` + (stats.waiting ? `, ${stats.waiting} waiting` : "");
  $("prefix").textContent = `${stats.prefix_hits} (${stats.prefix_hit_tokens} tokens)`;
}

// ---- hands and keys

/** The message box is as high as its text. */
function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

let before = 0;
log.addEventListener("scroll", () => {
  const up = log.scrollTop < before; // a log that has become lower is no wish of the reader's
  following = log.scrollHeight - log.scrollTop - log.clientHeight < 48 || (following && !up);
  before = log.scrollTop;
});
new ResizeObserver(() => following && toEnd()).observe(log); // a notice has taken room
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking && !$("settings").open) stop();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
$("retry").addEventListener("click", regenerate);
$("new").addEventListener("click", startAnew);
$("export").addEventListener("click", exportChat);
$("open-settings").addEventListener("click", showSettings);
$("error-settings").addEventListener("click", () => {
  showSettings();
  $("key").focus();
});
$("settings").addEventListener("close", takeSettings);
$("defaults").addEventListener("click", () => {
  for (const [name, value] of Object.entries(DEFAULTS)) $(name).value = value;
});
document.addEventListener("visibilitychange", look);
addEventListener("pagehide", keepTurns);
addEventListener("storage", ({ key: name }) => {
  if (name !== "hymba.turns" || asking) return; // another tab of this page
  recallTurns();
  drawTurns();
});

const kept = recall(localStorage, "hymba.settings", {});
for (const name of Object.keys(DEFAULTS)) {
  if (typeof kept[name] === "string") settings[name] = kept[name];
}
recallTurns();
drawTurns();
look();
if (!matchMedia("(pointer: coarse)").matches) message.focus();
