"use strict";

const stars = Number(document.body.dataset.stars);
const per = document.body.dataset.per;
const log = document.getElementById("log");
const whole = document.getElementById("whole");
const form = document.getElementById("form");
const text = document.getElementById("text");
const send = document.getElementById("send");
const notice = document.getElementById("notice");
const count = document.getElementById("count");
const TRIES = 4;
let conversation = null;

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function pause(seconds) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
}

async function post(path, content) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  });
  if (!response.ok) {
    const found = await response.json().catch(() => ({}));
    const error = new Error(found.error || "The server does not answer as it should; please try again.");
    error.status = response.status;
    error.wait = Number(response.headers.get("Retry-After")) || 1;
    throw error;
  }
  return response;
}

// What is only for a while, such as a lost connection or a full queue, is tried again by itself.
async function patient(path, content) {
  for (let tried = 1; ; tried++) {
    try {
      return await post(path, content);
    } catch (error) {
      const passing = error.status === undefined || error.status === 429 || error.status === 503;
      if (!passing || tried === TRIES) {
        throw error.status === undefined ? new Error("The server cannot be reached; please try again.") : error;
      }
      notice.textContent = error.status ? `${error.message} Trying again.` : "The connection was lost. Trying again.";
      await pause(Math.min(error.wait || 1, 10));
      notice.textContent = "";
    }
  }
}

function showCount(number) {
  count.textContent = number ? `Thank you! ${number} ${number === 1 ? "rating" : "ratings"} from you so far.` : "";
}

function bubble(author, content) {
  const words = make("p", { textContent: content });
  const name = make("span", { className: "unseen", textContent: author === "mine" ? "You:" : "Assistant:" });
  const found = make("div", { className: `message ${author}` }, name, words);
  log.append(found);
  found.scrollIntoView({ block: "end" });
  return { found, words };
}

function rater(label, of, answer) {
  const said = make("span", { role: "status" });
  const buttons = [];
  // One vote after the other: the last click is the one that stands, however often an earlier one is sent again.
  let saving = Promise.resolve();
  let saved = 0;
  for (let value = 1; value <= stars; value++) {
    // Not every device has pictures of thumbs.
    const word = value === 1 ? "Bad" : "Good";
    const button = make("button", { type: "button", textContent: stars === 2 ? word : "★" });
    button.setAttribute("aria-label", stars === 2 ? word : `${value} of ${stars} stars`);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      show(value);
      saving = saving.then(() => rate(value));
    });
    buttons.push(button);
  }
  const legend = make("legend", { className: "unseen", textContent: label });
  const className = stars === 2 ? "rating thumbs" : "rating";
  const group = make("fieldset", { className }, legend, ...buttons, said);

  async function rate(value) {
    show(value);
    said.textContent = "Saving";
    // One key for one vote: however often it is sent, it counts once.
    const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (x) => x.toString(16).padStart(2, "0")).join("");
    const vote = answer === null ? { key, stars: value } : { key, stars: value, answer };
    try {
      const found = await (await patient(`/api/conversations/${of}/ratings`, vote)).json();
      saved = value;
      said.textContent = "Thank you!";
      notice.textContent = "";
      showCount(found.ratings);
    } catch (error) {
      show(saved);
      said.textContent = "";
      notice.textContent = error.message;
    }
  }

  function show(value) {
    buttons.forEach((button, place) => {
      button.classList.toggle("lit", stars === 2 ? place + 1 === value : place < value);
      button.setAttribute("aria-pressed", String(place + 1 === value));
    });
  }
  return group;
}

async function begin() {
  conversation = (await (await patient("/api/conversations", {})).json()).conversation;
}

function clear() {
  conversation = null;
  log.replaceChildren();
  whole.replaceChildren();
  notice.textContent = "";
  text.focus();
}

async function ask(message) {
  if (conversation === null) await begin();
  const response = await patient(`/api/conversations/${conversation}/messages`, { text: message });
  const { found, words } = bubble("theirs", "");
  found.classList.add("writing");
  found.setAttribute("aria-busy", "true");
  try {
    await read(response, found, words);
  } finally {
    found.classList.remove("writing");
    found.removeAttribute("aria-busy");
  }
}

async function read(response, found, words) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer was cut off; please send your message again.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.text !== undefined) {
        words.append(event.text);
        found.scrollIntoView({ block: "end" });
      } else if (event.answer !== undefined) {
        if (words.textContent.trim() === "") words.textContent = "(no words)";
        if (per === "answer") found.append(rater("Rate this answer", conversation, event.answer));
        else if (!whole.hasChildNodes()) whole.append(rater("Rate this conversation", conversation, null));
        found.scrollIntoView({ block: "end" });
        return;
      } else {
        throw new Error(event.error);
      }
    }
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const message = text.value.trim();
  if (message === "" || send.disabled) return;
  send.disabled = true;
  notice.textContent = "";
  const { found } = bubble("mine", message);
  text.value = "";
  resize();
  try {
    await ask(message);
  } catch (error) {
    if (error.status === 404 || error.status === 410) conversation = null;
    if (log.lastElementChild === found) {
      // Nothing has come back: the words are given back, too.
      found.remove();
      text.value = message;
      resize();
    }
    notice.textContent = error.status ? error.message : error.message || "The connection was lost; please try again.";
  }
  send.disabled = false;
  text.focus();
});

function resize() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

text.addEventListener("input", resize);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.getElementById("again").addEventListener("click", clear);
fetch("/api/status").then((response) => response.json()).then((found) => showCount(found.ratings), () => {});
text.focus();
