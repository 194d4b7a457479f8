// The page: hits as one types, each coloured by what matched; a hit opened tells why. What others wrote, passages and
// ids among it, enters the page by textContent alone.
"use strict";

const WAIT = 150; // ms after a key before a search
const PATIENCE = 120; // ms that hits wait for what matched; then they are shown, and coloured later
const HIGHLIGHTED = 100; // passages that the server explains at a time
const EXCERPT = 420; // characters of a hit's text
const $ = (id) => document.getElementById(id);
const fields = ["q", "where", "quality", "k"]; // of the form, and of the address
let asking = null; // AbortController of the search that runs
let timer = 0;
let hits = [];
let explained = null; // what the dialog shows

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.map(String)); // as text
  return element;
}

function put(parent, ...children) {
  parent.replaceChildren(...children);
  return parent;
}

// ------------------------------------------------------------------------------------------------------- asking

async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: body ? { "Content-Type": "application/json" } : {},
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: has it been ended?");
  }
  const answer = await response.json().catch(() => ({ error: `the server answers with ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function search() {
  clearTimeout(timer);
  asking?.abort();
  const q = $("q").value;
  keepAddress();
  if (!q.trim()) return show([], "");
  const mine = (asking = new AbortController());
  const k = Math.min(Math.max(parseInt($("k").value, 10) || 10, 1), Number($("k").max));
  const body = { q, k, quality: $("quality").value };
  if ($("where").value.trim()) body.where = $("where").value;
  const started = performance.now();
  $("hits").classList.add("stale");
  try {
    const { hits, ms } = await ask("search", body, mine.signal);
    const matched = highlight(q, hits, ms, mine.signal);
    await Promise.race([matched, new Promise((resolve) => setTimeout(resolve, PATIENCE))]);
    const status = () => {
      const took = Object.entries(ms).map(([step, ms]) => `${step} ${ms.toFixed(1)}`);
      const total = (performance.now() - started).toFixed(0);
      if (!hits.length && body.where) return "0 hits: no passage fulfils the filter";
      return `${hits.length} ${hits.length === 1 ? "hit" : "hits"} in ${total} ms (${took.join(" · ")})`;
    };
    if (mine !== asking) return;
    show(hits, status());
    await matched;
    if (mine !== asking) return;
    hits.forEach((hit, at) => colour($("hits").children[at].querySelector(".text"), hit));
    $("status").textContent = status();
  } catch (error) {
    if (error.name !== "AbortError" && mine === asking) fail(error.message);
  }
}

// Add to each hit its pieces, and how long they took. Hits without them are shown all the same.
async function highlight(query, hits, ms, signal) {
  if (!hits.length || hits[0].text === null) return;
  try {
    const answer = await ask("highlight", { query, pids: hits.slice(0, HIGHLIGHTED).map((hit) => hit.pid) }, signal);
    for (const hit of hits) hit.pieces = answer.pieces[hit.pid];
    ms.explain = answer.ms.explain;
  } catch {}
}

function later() {
  clearTimeout(timer);
  timer = setTimeout(search, WAIT);
}

// What was found before stays, in grey.
function fail(line) {
  $("status").textContent = "";
  $("error").textContent = line;
  $("error").hidden = false;
}

// --------------------------------------------------------------------------------------------------------- hits

function show(found, status) {
  hits = found;
  $("error").hidden = true;
  $("status").textContent = status;
  $("hits").classList.remove("stale");
  $("help").hidden = found.length > 0;
  put($("hits"), ...found.map(card));
}

function card(hit, at) {
  const item = make("li", "hit");
  const button = make("button", "open");
  button.type = "button";
  button.setAttribute("aria-label", `hit ${at + 1}, passage ${hit.pid}, score ${hit.score.toFixed(2)}: why?`);
  button.append(
    make("span", "rank", at + 1),
    make("span", "pid", hit.pid),
    make("span", "why", "why?"),
    make("span", "score", hit.score.toFixed(2))
  );
  const text = make("p", "text");
  colour(text, hit);
  item.append(button, text);
  const data = Object.entries(hit.metadata ?? {});
  if (data.length) {
    const list = make("dl", "data");
    for (const [name, value] of data) {
      const pair = make("div");
      pair.append(make("dt", "", name), make("dd", "", typeof value === "object" ? JSON.stringify(value) : value));
      list.append(pair);
    }
    item.append(list);
  }
  item.addEventListener("click", () => String(getSelection()) || open(at));
  return item;
}

function colour(text, hit) {
  if (hit.text === null) put(text, make("span", "unread", "(this index keeps no texts)"));
  else put(text, ...excerpt(hit.pieces ?? [{ text: hit.text }]).map((piece) => shown(piece, false)));
}

// The pieces of the stretch of EXCERPT characters with most in it that matched, without special tokens.
function excerpt(pieces) {
  pieces = pieces.filter((piece) => !piece.special);
  const starts = [];
  let length = 0;
  for (const piece of pieces) {
    starts.push(length);
    length += piece.text.length;
  }
  if (length <= EXCERPT * 1.3) return pieces;
  const weight = (from) =>
    pieces.reduce((sum, piece, i) => {
      const inside = starts[i] >= from && starts[i] + piece.text.length <= from + EXCERPT;
      return sum + (inside && piece.matched ? piece.similarity ** 2 * piece.matched.length : 0);
    }, 0);
  let [first, most] = [0, weight(0)];
  for (const start of starts) {
    const from = Math.max(0, start - 60); // some words before the first that matched
    if (weight(from) > most * 1.001) [first, most] = [from, weight(from)];
  }
  const whole = pieces.map((piece) => piece.text).join("");
  if (first) first = whole.indexOf(" ", first) + 1;
  let end = Math.min(first + EXCERPT, length);
  if (end < length) end = Math.max(whole.lastIndexOf(" ", end), first + 1);
  const cut = pieces
    .map((piece, i) => ({ ...piece, text: piece.text.slice(Math.max(0, first - starts[i]), Math.max(0, end - starts[i])) }))
    .filter((piece) => piece.text);
  return [...(first ? [{ text: "… " }] : []), ...cut, ...(end < length ? [{ text: " …" }] : [])];
}

// A piece of a passage; `over`: with the query tokens that matched it written over it.
function shown(piece, over) {
  const matched = [...(piece.matched ?? [])];
  let element = make("span", "", piece.text);
  if (matched.length && over) {
    element = make("ruby", "", piece.text);
    const names = matched.slice(0, 3).map(([token]) => token);
    if (matched.length > 3) names.push(`+${matched.length - 3}`);
    element.append(make("rt", "", names.join(" · ")));
  }
  if (matched.length) {
    element.classList.add("match");
    element.style.setProperty("--s", Math.max(0, piece.similarity));
  }
  if (piece.fill && over) element.classList.add("fill");
  if (piece.special) element.classList.add("special");
  if (piece.unread) element.classList.add("unread");
  const title = matched.map(([token, similarity]) => `${token} ${similarity.toFixed(2)}`);
  if (piece.fill) title.push(`${piece.fill} [MASK]`);
  if (piece.unread) title.push("the model does not read this far");
  if (title.length) element.title = title.join(", ");
  return element;
}

// ---------------------------------------------------------------------------------------------------------- why

async function open(at) {
  const hit = hits[at];
  try {
    explained = await ask("explain", { query: $("q").value, pid: hit.pid });
  } catch (error) {
    return fail(error.message);
  }
  const fill = explained.query.filter((token) => token.fill);
  const sum = (tokens) => tokens.reduce((total, token) => total + token.similarity, 0).toFixed(2);
  const words = explained.query.filter((token) => !token.fill);
  const parts = [`${sum(words)} from ${words.length} tokens`];
  if (fill.length) parts.push(`${sum(fill)} from ${fill.length} [MASK]`);
  $("why-title").textContent = `Why passage ${hit.pid}?`;
  $("why-sum").textContent = `score ${explained.score.toFixed(2)} = ${parts.join(" + ")} · ${explained.ms.explain.toFixed(0)} ms`;
  put($("why-text"), ...explained.pieces.map((piece) => shown(piece, true)));
  $("all").checked = false;
  drawMap();
  drawMatches(words, fill);
  if (!$("why").open) $("why").showModal();
  $("why").scrollTop = 0;
}

// Positions of the columns: all, or what matched with its neighbours; -1 stands for some that are left out.
function columns() {
  const n = explained.tokens.length;
  if ($("all").checked || n <= 24) return [...Array(n).keys()];
  const chosen = new Set(explained.query.map((token) => token.position));
  const list = [];
  for (let at = 0; at < n; at++) {
    if (chosen.has(at)) list.push(at);
    else if (list.at(-1) !== -1) list.push(-1);
  }
  return list;
}

function cell(similarity, text, className = "") {
  const td = make("td", className, text);
  td.style.setProperty("--s", Math.max(0, similarity));
  return td;
}

function rowHead(name, number) {
  const th = make("th", "", name);
  th.scope = "row";
  th.append(make("b", "", number.toFixed(2)));
  return th;
}

function drawMap() {
  const { query, tokens, similarity } = explained;
  const list = columns();
  const head = make("tr");
  head.append(make("th"));
  for (const at of list) {
    const th = make("th");
    th.scope = "col";
    th.append(make("span", at < 0 || tokens[at].special ? "special" : "", at < 0 ? "⋯" : tokens[at].token));
    head.append(th);
  }
  const body = make("tbody");
  query.forEach((token, row) => {
    if (token.fill) return;
    const tr = make("tr");
    tr.append(rowHead(token.token, token.similarity));
    for (const at of list) {
      if (at < 0) tr.append(make("td", "gap"));
      else tr.append(cell(similarity[row][at], short(similarity[row][at]), at === token.position ? "best" : ""));
    }
    body.append(tr);
  });
  const fill = query.flatMap((token, row) => (token.fill ? [row] : []));
  if (fill.length) {
    const tr = make("tr", "grey");
    tr.title = "the mean of the [MASK] fill; a number: so many [MASK] matched here";
    tr.append(rowHead(`${fill.length} [MASK]`, fill.reduce((sum, row) => sum + query[row].similarity, 0)));
    for (const at of list) {
      const n = fill.filter((row) => query[row].position === at).length;
      const mean = fill.reduce((sum, row) => sum + (similarity[row][at] ?? 0), 0) / fill.length;
      tr.append(at < 0 ? make("td", "gap") : cell(mean, n || ""));
    }
    body.append(tr);
  }
  const thead = make("thead");
  thead.append(head);
  put($("map"), thead, body);
}

const short = (number) => number.toFixed(2).replace(/^(-?)0\./, "$1.");

function drawMatches(words, fill) {
  const row = (tag, ...cells) => {
    const tr = make("tr");
    cells.forEach((text, i) => tr.append(make(tag, i === 2 ? "number" : "", text)));
    return tr;
  };
  const [head, body, foot] = ["thead", "tbody", "tfoot"].map((tag) => make(tag));
  head.append(row("th", "of the query", "best in the passage", "similarity"));
  for (const token of words) {
    body.append(row("td", token.token, explained.tokens[token.position].token, token.similarity.toFixed(3)));
  }
  if (fill.length) {
    const sum = fill.reduce((total, token) => total + token.similarity, 0);
    body.append(row("td", `${fill.length} [MASK]`, "each its own", sum.toFixed(3)));
  }
  foot.append(row("td", "score", "", explained.score.toFixed(3)));
  put($("matches"), head, body, foot);
}

// ---------------------------------------------------------------------------------- address, keys, light and dark

function keepAddress() {
  const search = new URLSearchParams();
  for (const id of fields) {
    const usual = { quality: "default", k: "10" }[id] ?? "";
    if ($(id).value !== usual) search.set(id, $(id).value);
  }
  history.replaceState(null, "", search.size ? `?${search}` : location.pathname);
  document.title = $("q").value.trim() ? `${$("q").value.trim()} · nanoColBERT` : "nanoColBERT";
}

function readAddress() {
  const search = new URLSearchParams(location.search);
  for (const id of fields) if (search.has(id)) $(id).value = search.get(id);
  if (!$("quality").value) $("quality").value = "default";
}

function onKey(event) {
  if ($("why").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const buttons = [...document.querySelectorAll(".open")];
  const at = buttons.indexOf(document.activeElement);
  const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName);
  if (event.key === "/" && !isTyping) focus($("q"));
  else if (event.key === "Escape" && at >= 0) focus($("q"));
  else if (event.key === "ArrowDown" && at >= 0) focus(buttons[at + 1]);
  else if (event.key === "ArrowDown" && document.activeElement === $("q")) focus(buttons[0]);
  else if (event.key === "ArrowUp" && at >= 0) focus(buttons[at - 1] ?? $("q"));
  else return;
  event.preventDefault();
}

function focus(element) {
  element?.focus({ preventScroll: true });
  (element?.closest(".hit") ?? element)?.scrollIntoView({ block: "nearest" });
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `switch to ${theme === "dark" ? "light" : "dark"}`);
}

function stored(theme) {
  try {
    if (theme) localStorage.setItem("theme", theme);
    return localStorage.getItem("theme");
  } catch {
    return null; // a browser that keeps nothing
  }
}

async function about() {
  const health = await ask("health");
  $("about").textContent = `${health.passages.toLocaleString("en")} passages in ${health.index}`;
  $("k").max = health.max_k;
  if (!health.fields.length) return;
  $("filter").hidden = $("fields").hidden = false;
  $("where").placeholder = `SQL, as ${health.fields[0]} = '…' AND …`;
  put($("fields"), "Fields:");
  for (const name of health.fields) {
    const button = make("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      const before = $("where").value.trimEnd();
      const joint = before && !/(\b(and|or|not)|\()$/i.test(before) ? " AND " : " ";
      $("where").value = `${before}${joint}${name} `.trimStart();
      $("where").focus();
    });
    $("fields").append(button);
  }
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(stored() ?? (prefersDark.matches ? "dark" : "light"));
prefersDark.addEventListener("change", (event) => stored() ?? setTheme(event.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
  stored(theme);
});
$("form").addEventListener("submit", (event) => (event.preventDefault(), search()));
for (const id of fields) $(id).addEventListener("input", later);
$("all").addEventListener("change", drawMap);
$("close").addEventListener("click", () => $("why").close());
$("why").addEventListener("click", (event) => event.target === $("why") && $("why").close());
document.addEventListener("keydown", onKey);
addEventListener("popstate", () => (readAddress(), search()));
readAddress();
search();
about().catch((error) => fail(error.message));
