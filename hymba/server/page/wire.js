// What is sent and received, and how fast: the server's API over fetch, answers as server-sent events.
// Nothing here knows of the page. What goes wrong is a Problem: a kind and a sentence for people.

export class Problem extends Error {
  /** kind: "gone", "key", "busy", "broken" (mid-answer) or "refused". */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** GET a JSON object. */
export async function ask(path, key) {
  const response = await reach(path, { headers: headers(key), cache: "no-store" });
  try {
    return await response.json();
  } catch {
    throw new Problem("refused", `${path} is not answered with JSON: is this a hymba server?`);
  }
}

/**
 * Ask for an answer and give it in pieces: {text}, {finish}, {usage}, whichever an event brings.
 * Ends when the server has said all of it; throws a Problem, or AbortError when `signal` stops it.
 */
export async function* answer(body, key, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const event = parse(data);
    if (event.error) throw new Problem("broken", told(event, "The server broke off."));
    const choice = event.choices?.[0];
    finished ||= Boolean(choice?.finish_reason);
    yield {
      text: choice?.delta?.content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
  if (!finished) throw new Problem("broken", "The connection ended in the middle of the answer.");
}

/** The content of every `data:` line, however the network has cut the lines. */
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      rest += done ? decoder.decode() + "\n" : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const found = /^data: ?(.*?)\r?$/.exec(line);
        if (found) yield found[1];
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("gone", "The connection broke in the middle of the answer. Is the server still running?");
  }
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Problem("broken", "The server sent something that cannot be read.");
  }
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(
      "gone",
      "The server does not answer. Start it again with hymba serve; the conversation is kept here.",
    );
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const { status } = response;
  if (status === 401 || status === 403) {
    return new Problem("key", "The server wants an API key, and this is not it. Enter it in the settings.");
  }
  if (status === 429) {
    const seconds = Number(response.headers.get("Retry-After"));
    const when = seconds > 0 ? `in ${seconds} second${seconds === 1 ? "" : "s"}` : "in a moment";
    return new Problem("busy", `The server is busy with other requests. Try again ${when}.`);
  }
  if (status === 503) return new Problem("busy", told(body, "The server is not ready.") + " Try again in a moment.");
  const words = told(body, `The server refused with status ${status}.`);
  const long = body?.error?.code === "context_length_exceeded" || status === 413;
  return new Problem("refused", long ? `${words} Start a new chat, or shorten the system text.` : words);
}

/** The server's own words in an error object. */
function told(body, otherwise) {
  const words = body?.error?.message;
  const text = typeof words === "string" && words ? words : otherwise;
  const sentence = text[0].toUpperCase() + text.slice(1);
  return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// ---- how fast

/** Times an answer: `tick` at each piece of text, `facts` at the end. */
export class Watch {
  start = performance.now();
  first = 0;
  last = 0;
  pieces = 0;

  tick() {
    this.last = performance.now();
    this.first ||= this.last;
    this.pieces += 1;
  }

  /** The small line under an answer: "42 tokens · 31 tokens/s · first after 0.12 s". */
  facts(finish, usage, limit) {
    const words = this.first ? [] : ["an empty answer"];
    const count = usage?.completion_tokens;
    const seconds = (this.last - this.first) / 1000;
    if (count !== undefined) words.push(count === 1 ? "1 token" : `${count} tokens`);
    const known = count ?? this.pieces; // a server may send several tokens in one piece
    if (known > 1 && seconds > 0) words.push(`${count ? "" : "about "}${short((known - 1) / seconds)} tokens/s`);
    if (this.first) words.push(`first after ${((this.first - this.start) / 1000).toFixed(2)} s`);
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (cached) words.push(`${cached} of ${usage.prompt_tokens} prompt tokens from the prefix cache`);
    if (finish === "length") words.push(count >= limit ? `cut at max tokens (${limit})` : "cut: no position left");
    else if (finish && finish !== "stop") words.push(finish);
    return words.join(" · ");
  }
}

/** A rate for people: 7.3, 412, 21,040. */
export function short(number) {
  return number < 10 ? Number(number).toFixed(1) : Math.round(number).toLocaleString("en");
}

/** Bytes for people: 78.6 MB. */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (bytes >= 999.5 && power < units.length - 1) [bytes, power] = [bytes / 1000, power + 1];
  return `${power ? bytes.toPrecision(3) : bytes} ${units[power]}`;
}
