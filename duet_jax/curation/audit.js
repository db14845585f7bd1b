"use strict";
// Texts of the data reach the page as text nodes only.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { columns, rows } = read("data");
const { domains, numbers } = read("names");
const place = Object.fromEntries(columns.map((name, number) => [name, number]));
const control = Object.fromEntries(
  ["action", "domain", "text", "sort", "order", "back", "on", "status", "rows"].map((id) => [id, document.getElementById(id)]),
);
const SEARCHED = ["id", "prompt", "target", "proposal"];
const PAGE = 50;
let found = [];
let page = 0;

const get = (row, name) => row[place[name]];
const words = (name) => name.replaceAll("_", " ");

function show(value) {
  if (value === null) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return String(Number(value.toPrecision(4)));
}

function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function block(title, text) {
  const written = make("pre", text);
  written.dir = "auto";
  written.tabIndex = 0;
  written.setAttribute("aria-label", title);
  return [make("h2", title), written];
}

function pairs(entries) {
  const list = make("dl", undefined, "grid");
  for (const [name, value] of entries) {
    const pair = make("div");
    pair.append(make("dt", words(name)), make("dd", show(value)));
    list.append(pair);
  }
  return list;
}

function table(heads, lines) {
  const whole = make("div", undefined, "wide");
  const made = make("table");
  const top = made.createTHead().insertRow();
  heads.forEach((head, number) => {
    const cell = make("th", head, number ? "" : "text");
    cell.scope = "col";
    top.append(cell);
  });
  const body = made.createTBody();
  for (const line of lines) {
    const written = body.insertRow();
    line.forEach((value, number) => written.append(number ? make("td", show(value)) : make("td", value, "text")));
  }
  whole.append(made);
  return whole;
}

function inside(row) {
  const made = make("div", undefined, "inside");
  made.append(...block("prompt", get(row, "prompt")), ...block("target", get(row, "target")));
  if (get(row, "proposal") !== null) made.append(...block("proposal", get(row, "proposal")));
  const flags = ["beaten", "better"].map((name) => [name, get(row, name)]);
  made.append(make("h2", "numbers"), pairs([...numbers.map((name) => [name, get(row, name)]), ...flags]));
  const samples = get(row, "samples");
  if (samples.length) {
    const numbered = samples.map((text, i) => [text, get(row, "similarities")[i], get(row, "matches")[i]]);
    made.append(make("h2", "sampled answers"), table(["answer", "similarity", "match"], numbered));
  }
  const options = get(row, "options").map((values, i) => [`question ${i + 1}`, ...values]);
  made.append(make("h2", "self-reflection"), table(["", "correct", "incorrect", "not sure"], options));
  const rounds = get(row, "rounds");
  if (rounds.length > 1) {
    const heads = Object.keys(rounds[0]);
    made.append(make("h2", "iterations"), table(heads.map(words), rounds.map((one) => heads.map((head) => one[head]))));
  }
  return made;
}

function line(row) {
  const item = make("li");
  const whole = make("details");
  const top = make("summary");
  const action = get(row, "action");
  const prompt = get(row, "prompt");
  const about = make("bdi", `${get(row, "domain")} · ${get(row, "id")}`, "soft about");
  top.append(
    make("span", action, `badge ${action}`),
    make("span", show(get(row, control.sort.value || "confidence")), "value"),
    make("bdi", `${get(row, "target")} ← ${prompt.slice(-90)}`),
    about,
  );
  whole.append(top);
  whole.addEventListener("toggle", () => {
    if (whole.open && whole.childElementCount === 1) whole.append(inside(row));
  });
  item.append(whole);
  return item;
}

function draw() {
  const last = Math.max(Math.ceil(found.length / PAGE), 1);
  const begin = page * PAGE;
  control.rows.replaceChildren(...found.slice(begin, begin + PAGE).map(line));
  control.back.disabled = page === 0;
  control.on.disabled = page + 1 >= last;
  control.status.textContent = `${found.length} of ${rows.length} examples, page ${page + 1} of ${last}`;
}

function choose() {
  const action = control.action.value;
  const domain = control.domain.value && domains[control.domain.value - 1];
  const text = control.text.value.toLowerCase();
  found = rows.filter(
    (row) =>
      (!action || get(row, "action") === action) &&
      (!control.domain.value || get(row, "domain") === domain) &&
      (!text || SEARCHED.some((name) => (get(row, name) ?? "").toLowerCase().includes(text))),
  );
  const key = control.sort.value;
  const sign = Number(control.order.value);
  // What has no number comes last in both orders.
  const order = (a, b) => (a === null || b === null ? (a === null) - (b === null) : sign * (a - b));
  if (key) found.sort((a, b) => order(get(a, key), get(b, key)));
  page = 0;
  draw();
}

function turn(by) {
  page += by;
  draw();
  control.status.scrollIntoView({ block: "nearest" });
}

for (const id of ["action", "domain", "text", "sort", "order"]) control[id].addEventListener("input", choose);
control.back.addEventListener("click", () => turn(-1));
control.on.addEventListener("click", () => turn(1));
choose();
