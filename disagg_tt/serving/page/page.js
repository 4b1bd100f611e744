// A chat over /v1/chat/completions, and what GET /state says, once a second. Plain DOM; text only ever as text.

const $ = (id) => document.getElementById(id);
const POLL_MS = 1000;

function element(tag, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

// ---- the server ----

let asking = null; // for the API key: several requests may find out at once that one is needed

function askKey() {
  asking ??= new Promise((resolve) => {
    $("ask-key").showModal();
    $("ask-key").onclose = () => {
      sessionStorage.setItem("key", $("key").value);
      asking = null;
      resolve();
    };
  });
  return asking;
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    if (sessionStorage.getItem("key") === key) await askKey();
    return call(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (rest + part.value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      if (event === "data: [DONE]") return;
      const value = JSON.parse(event.slice("data: ".length));
      if (value.error) throw new Error(value.error.message);
      yield value;
    }
  }
  throw new Error("The answer broke off.");
}

// ---- the chat ----

let messages = [];
let conversation = newId();
let running = null;

function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("");
}

function addTurn(role, text) {
  const said = element("p", { text });
  const turn = element("li", { className: role }, said);
  $("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return [turn, said];
}

function cost(response, usage) {
  const ttft = Number(response.headers.get("x-ttft-ms")).toFixed(1);
  const cached = usage && `${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens cached`;
  const parts = [`${ttft} ms to the first token`, cached, response.headers.get("x-route")];
  const title = (response.headers.get("x-time-budget") ?? "").replaceAll("=", " ").replaceAll(",", " ms, ") + " ms";
  return element("small", { text: parts.filter(Boolean).join(" · "), title, className: "cost" });
}

async function answer() {
  const [turn, said] = addTurn("assistant", "");
  turn.classList.add("writing");
  const chat = messages; // a new chat may begin meanwhile
  const own = (running = new AbortController());
  showRunning();
  let text = "";
  try {
    const response = await call("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal: own.signal,
      body: JSON.stringify({
        model: $("model").textContent,
        messages: chat,
        conversation_id: conversation,
        stream: true,
        stream_options: { include_usage: true },
        temperature: Number($("temperature").value),
        max_tokens: Number($("tokens").value),
      }),
    });
    let usage = null;
    for await (const chunk of events(response)) {
      usage = chunk.usage ?? usage;
      text += chunk.choices[0]?.delta.content ?? "";
      said.textContent = text;
      turn.scrollIntoView({ block: "end" });
    }
    turn.append(cost(response, usage));
  } catch (error) {
    const stopped = error.name === "AbortError";
    turn.append(element("small", { text: stopped ? "Stopped." : error.message, className: stopped ? "" : "error" }));
    if (!text) {
      const asked = chat.pop().content;
      if (!stopped) $("text").value ||= asked; // to be sent again
      return;
    }
  } finally {
    if (running === own) running = null;
    showRunning();
    turn.classList.remove("writing");
    turn.scrollIntoView({ block: "end" });
  }
  chat.push({ role: "assistant", content: text });
}

function showRunning() {
  $("stop").hidden = running === null;
  $("send").hidden = running !== null;
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
$("anew").onclick = () => {
  running?.abort();
  running = null;
  showRunning();
  messages = [];
  conversation = newId();
  $("turns").replaceChildren();
  $("text").focus();
};

// ---- the meshes ----

function bar(name, total, ...used) {
  const parts = used.map((n) => {
    const part = element("i");
    part.style.width = `${(100 * n) / total}%`;
    return part;
  });
  const [inUse, cached] = used;
  const text = `${name} ${inUse} of ${total}` + (cached ? `, ${cached} cached` : "");
  return [element("small", { text }), element("div", { className: "bar" }, ...parts)];
}

function workerCard(worker) {
  const status = element("span", { text: worker.status, className: `pill ${worker.status}` });
  const counts = `${worker.role}, ${worker.running} running, ${worker.waiting} waiting`;
  return element(
    "div",
    { className: `worker ${worker.role}` },
    element("b", {}, worker.name, status),
    element("div", { text: counts, className: "small" }),
    ...(worker.slots_total ? bar("Slots", worker.slots_total, worker.slots_used) : []),
    ...(worker.blocks_total ? bar("Blocks", worker.blocks_total, worker.blocks_used, worker.blocks_cached) : []),
  );
}

function requestTable(requests) {
  const row = (tag, ...cells) => element("tr", {}, ...cells.map((text) => element(tag, { text })));
  const rows = requests.map((request) =>
    row(
      "td",
      request.phase,
      request.route,
      `${request.prompt_tokens} (${request.cached_tokens} cached)`,
      request.new_tokens,
      `${(request.age_ms / 1000).toFixed(1)} s`,
    ),
  );
  return element("table", {}, row("th", "phase", "route", "prompt", "new", "since"), ...rows);
}

function transferCard(transfer) {
  const end = Math.max(transfer.prefill_ms, ...transfer.layers.map((layer) => layer.arrived_ms), 0.001);
  const track = (from, to, className, title) => {
    const span = element("i");
    span.style.left = `${(100 * from) / end}%`;
    span.style.width = `${(100 * (to - from)) / end}%`;
    return element("div", { className: `track ${className}`, title }, span);
  };
  const ms = (value) => `${value.toFixed(1)} ms`;
  const size = transfer.bytes < 1e6 ? `${(transfer.bytes / 1e3).toFixed(0)} kB` : `${(transfer.bytes / 1e6).toFixed(1)} MB`;
  return element(
    "div",
    { className: "transfer" },
    element("div", { text: `${transfer.source} → ${transfer.target}, ${transfer.tokens} tokens, ${size}` }),
    track(0, transfer.prefill_ms, "prefill", `prefill ${ms(transfer.prefill_ms)}`),
    ...transfer.layers.map((layer, i) =>
      track(layer.sent_ms, layer.arrived_ms, "", `layer ${i}: sent ${ms(layer.sent_ms)}, arrived ${ms(layer.arrived_ms)}`),
    ),
    element("small", {
      text: `${ms(transfer.hidden_ms)} hidden, ${ms(transfer.exposed_ms)} exposed, handover ${ms(transfer.handover_ms)}; ${(transfer.age_ms / 1000).toFixed(1)} s ago`,
    }),
  );
}

function show(state) {
  for (const button of $("modes").children) button.setAttribute("aria-pressed", button.value === state.mode);
  const nothing = (text) => element("small", { text });
  $("workers").replaceChildren(...(state.workers.length ? state.workers.map(workerCard) : [nothing("None yet.")]));
  $("requests").replaceChildren(state.requests.length ? requestTable(state.requests) : nothing("Nothing."));
  const transfers = state.transfers.map(transferCard);
  $("transfers").replaceChildren(...(transfers.length ? transfers : [nothing("None yet.")]));
}

async function refresh() {
  try {
    if (!$("model").textContent) {
      const models = await (await call("/v1/models")).json();
      $("model").textContent = models.data[0].id;
    }
    show(await (await call("/state")).json());
    $("trouble").hidden = true;
  } catch (error) {
    $("trouble").textContent = `No news from the server: ${error.message}`;
    $("trouble").hidden = false;
  }
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_MS);
}

$("modes").onclick = async ({ target }) => {
  if (!target.value) return;
  await call(`/mode/${target.value}`, { method: "POST" }).catch(() => null); // what holds now is shown anyhow
  await refresh();
};

poll();
