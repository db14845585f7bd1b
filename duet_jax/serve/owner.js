"use strict";

const stars = Number(document.body.dataset.stars);
const notice = document.getElementById("notice");
const PAUSE = 5000;
let shown = "";

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

async function send(path, content) {
  notice.textContent = "";
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  try {
    const response = await fetch(path, options);
    const found = await response.json();
    if (!response.ok) notice.textContent = found.error;
  } catch {
    notice.textContent = "The server cannot be reached; please try again.";
  }
  await update();
}

function number(value, stderr) {
  return stderr === undefined ? value.toFixed(2) : `${value.toFixed(2)} ± ${stderr.toFixed(2)}`;
}

function shares(mixture) {
  const used = Object.entries(mixture).filter(([, share]) => share > 0.0005);
  return used.map(([name, share]) => `${name} ${(100 * share).toFixed(0)} %`).join(", ");
}

function bars(counts) {
  const most = Math.max(...counts, 1);
  const found = make("div", { className: "bars" });
  found.setAttribute("role", "img");
  const said = counts.map((count, place) => `${count} with ${place + 1}`).join(", ");
  found.setAttribute("aria-label", `Ratings by stars: ${said}`);
  counts.forEach((count, place) => {
    const bar = make("i");
    bar.style.height = `${(60 * count) / most}%`;
    const label = stars === 2 ? ["bad", "good"][place] : `${place + 1}★`;
    found.append(make("div", {}, bar, label));
  });
  return found;
}

function needed(trial) {
  if (trial.best) return "the best so far";
  if (trial.needed === null) return "cannot be told apart";
  return trial.needed === 0 ? "none, they differ" : trial.needed.toLocaleString();
}

function card(trial) {
  const state = trial.state === "open" && !trial.answers ? "opening" : trial.state;
  const title = make("h3", {}, `Trial ${trial.trial}`, make("span", { textContent: state }));
  const list = make("dl");
  const row = (name, value) => list.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  row("Ratings", trial.count.toLocaleString());
  if (trial.estimate !== undefined) {
    row("Mean", number(trial.mean, trial.stderr));
    row("Estimate", number(trial.estimate, trial.estimate_stderr));
    row("More needed", needed(trial));
  }
  if (trial.feedback !== null) row("Told", number(trial.feedback));
  const found = make("article", { className: trial.best ? "card best" : "card" });
  found.append(title, make("p", { className: "soft", textContent: shares(trial.mixture) }));
  if (trial.count) found.append(bars(trial.counts));
  found.append(list);
  if (trial.state === "open") {
    const button = make("button", { type: "button", className: "main", textContent: "Tell the search" });
    button.disabled = trial.count === 0;
    button.setAttribute("aria-label", `Tell the search the ratings of trial ${trial.trial}, and go on`);
    button.addEventListener("click", () => {
      if (confirm(`Tell the search what ${trial.count} ratings say of trial ${trial.trial}? It is told once.`)) {
        send("/api/owner/tell", { trial: trial.trial });
      }
    });
    const summary = make("summary", { textContent: "Token for programs" });
    found.append(button, make("details", {}, summary, make("code", { textContent: trial.token })));
  }
  return found;
}

function line(rater) {
  const action = rater.excluded ? "Take in" : "Leave out";
  const button = make("button", { type: "button", textContent: action });
  button.setAttribute("aria-label", `${action} rater ${rater.name}`);
  button.addEventListener("click", () => send("/api/owner/raters", { rater: rater.name, excluded: !rater.excluded }));
  const doubt = rater.excluded ? "left out" : rater.doubt;
  return make(
    "tr",
    { className: rater.excluded ? "out" : "" },
    make("td", { className: "text", textContent: rater.name }),
    cell("ratings", rater.count),
    cell("mean", number(rater.mean)),
    cell("too fast", rater.timed ? `${rater.fast} of ${rater.timed}` : "–"),
    make("td", { className: "text doubt", textContent: doubt }),
    make("td", {}, button),
  );
}

// Where the window is narrow, cells stand below one another, each with its name.
function cell(name, value) {
  const found = make("td", { textContent: value });
  found.dataset.name = name;
  return found;
}

function draw(found) {
  document.getElementById("title").textContent = `${found.study}: ratings`;
  const told = found.trials.filter((trial) => trial.feedback !== null).length;
  const total = found.trials.reduce((sum, trial) => sum + trial.count, 0);
  document.getElementById("state").textContent = `${told} of ${found.rounds} rounds told · ${total.toLocaleString()} ratings`;
  const cards = found.trials.toReversed().map(card);
  const none = make("p", { className: "soft", textContent: "No trial yet; duet run trains the first one." });
  document.getElementById("trials").replaceChildren(...(cards.length ? cards : [none]));
  document.getElementById("raters").replaceChildren(...found.raters.map(line));
  const spread = document.getElementById("spread");
  const about = `Raters differ by about ${found.spread?.toFixed(2)} stars, and one rater's ratings by ${found.noise?.toFixed(2)}. `;
  spread.textContent =
    (found.spread === null ? "" : about) + "Raters are cookies; nothing else is known of them. Ratings left out stay in the file.";
}

async function update() {
  try {
    const response = await fetch("/api/owner/summary");
    const text = await response.text();
    if (!response.ok) throw new Error(JSON.parse(text).error);
    // Redrawn only when something is new, so that nobody loses the focus.
    if (text !== shown) draw(JSON.parse(text));
    shown = text;
  } catch (error) {
    notice.textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
}

async function watch() {
  if (!document.hidden) await update();
  setTimeout(watch, PAUSE);
}
watch();
