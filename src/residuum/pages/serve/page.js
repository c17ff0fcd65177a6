"use strict";
// A picture goes to /predict, then to /explain; whatever comes back is shown as text, never as HTML.
const $ = (id) => document.getElementById(id);
const percent = (score) => (100 * score).toFixed(1) + " %";
let limits = null, calibrated = false, turn = 0, shown = null;

const element = (tag, text = "", name = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
};

const bar = (share) => {
  const made = element("div", "", "bar"), inside = element("i");
  inside.style.width = 100 * share + "%";
  made.append(inside);
  return made;
};

const fail = (sentence) => {
  $("status").textContent = "";
  $("error").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  $("error").hidden = false;
};

async function ask(path, file) {
  const form = new FormData();
  form.append("picture", file, file.name || "picture");
  let answer;
  try {
    answer = await fetch(path, { method: "POST", body: form });
  } catch {
    throw new Error("the service cannot be reached; is it still running?");
  }
  const document = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(document.error || `the service answered with status ${answer.status}.`);
  return document;
}

function showScores(file, top) {
  $("name").textContent = file.name || "pasted picture";
  $("answer").textContent = top[0].class;
  $("scores").replaceChildren(...top.map(({ class: name, score }) => {
    const row = element("li"), words = element("div");
    words.append(element("b", name), element("span", percent(score)));
    row.append(words, bar(score));
    return row;
  }));
  $("calibrated").textContent = calibrated
    ? "Calibrated: of many pictures with a score of 80 %, about 80 % are right."
    : "Not calibrated: this model has no temperature, so its scores may be too sure.";
  if (shown) URL.revokeObjectURL(shown);
  shown = URL.createObjectURL(file);
  $("picture").src = shown;
  $("heat").hidden = true;
  $("heat-words").textContent = "where it looked …";
  $("why").hidden = true;
  $("result").hidden = false;
}

function showReasons({ top, heat, blocks }) {
  $("heat").src = heat;
  $("heat").alt = `Heat map over the middle of the picture: where the evidence for ${top[0].class} lies`;
  $("heat").hidden = false;
  $("heat-words").textContent = "where it looked";
  $("blocks").replaceChildren(...blocks.map((each) => {
    const row = element("tr", "", each.answer_without !== null && each.answer_without !== top[0].class ? "changed" : "");
    const name = element("th", each.block, "mono"), strip = element("td");
    name.scope = "row";
    if (each.score_without !== null) strip.append(bar(each.score_without));
    row.append(name, element("td", each.ratio === null ? "–" : each.ratio.toFixed(2), "number"), strip,
      element("td", each.score_without === null ? "–" : percent(each.score_without), "number"),
      element("td", each.answer_without ?? "cannot be left out", "name"));
    return row;
  }));
  $("without-head").textContent = `score of ${top[0].class} without it`;
  $("why").hidden = false;
}

async function look(file) {
  const mine = ++turn;
  $("error").hidden = true;
  if (limits && file.size > limits.body_bytes - 1000) {
    $("result").hidden = true;
    return fail(`this picture has ${(file.size / 1e6).toFixed(1)} MB, more than the ${limits.body_bytes / 1e6} MB that are taken; make it smaller.`);
  }
  $("status").textContent = "Looking …";
  $("drop").setAttribute("aria-busy", "true");
  try {
    const { predictions } = await ask("/predict?top=5", file);
    if (mine !== turn) return;
    showScores(file, predictions[0].top);
    $("status").textContent = `It says: ${predictions[0].top[0].class}, ${percent(predictions[0].top[0].score)}.`;
    $("answer").focus({ preventScroll: false });
    const reasons = await ask("/explain?top=5", file);
    if (mine === turn) showReasons(reasons);
  } catch (error) {
    if (mine !== turn) return;
    if ($("status").textContent === "Looking …") $("result").hidden = true;
    else $("heat-words").textContent = "no heat map";
    fail(error.message);
  } finally {
    if (mine === turn) $("drop").removeAttribute("aria-busy");
  }
}

for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", (event) => {
    if (event.target.files.length) look(event.target.files[0]);
    event.target.value = "";  // the same file can be chosen again
  });
}
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) look(file); else fail("that was no file; drop a picture from your disk.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (file) look(file); else fail("there is no picture in the clipboard.");
});

fetch("/model").then((answer) => answer.json()).then((model) => {
  limits = model.limits;
  calibrated = model.calibrated;
  $("about").textContent = `${model.name}, ${model.classes.length.toLocaleString("en")} classes: `
    + model.classes.slice(0, 12).join(", ") + (model.classes.length > 12 ? ", …" : "") + ".";
  $("limits").textContent = `JPEG, PNG, WebP, GIF, BMP or TIFF, up to ${limits.body_bytes / 1e6} MB`;
}).catch(() => fail("the service cannot be reached; is it still running?"));
