"use strict";
// How the answer of each task is shown; whatever comes from the service is shown as text, never as HTML.
const $ = (id) => document.getElementById(id);
const percent = (score) => (100 * score).toFixed(1) + " %";

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

// A classifier: the classes with bars, and then where it looked and what each block did.

function showScores({ top }, picture, { calibrated }) {
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
  $("picture").src = picture;
  $("heat").hidden = true;
  $("heat-words").textContent = "where it looked …";
  $("why").hidden = true;
  $("scored").hidden = false;
  return `It says: ${top[0].class}, ${percent(top[0].score)}.`;
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

// Detectors and segmenters: something over the picture, and the same as a table.

function ink(colour) {  // black or white, whichever is read more easily on a colour
  const [r, g, b] = [1, 3, 5].map((at) => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

function patch(text, colour) {
  const made = element("span", text, "patch");
  made.style.background = colour;
  made.style.color = ink(colour);
  return made;
}

function showOver(picture, headings) {
  $("whole").src = picture;
  $("over").querySelectorAll("#mask, .box").forEach((old) => old.remove());
  $("found-head").replaceChildren(...headings.map(([words, kind]) => {
    const made = element("th", words, kind);
    made.scope = "col";
    return made;
  }));
  $("marked").hidden = false;
}

const counted = (boxes, classes) => classes.map((name) => [boxes.filter((box) => box.class === name).length, name])
  .filter(([n]) => n).map(([n, name]) => `${n.toLocaleString("en")} ${name}`).join(", ") || "nothing";

function drawBoxes({ boxes, width, height }, { classes, colours }) {
  const least = Number($("least").value) / 100, sure = boxes.filter((box) => box.score >= least);
  $("least-words").textContent = `${$("least").value} %`;
  $("answer").textContent = counted(sure, classes);
  $("over").querySelectorAll(".box").forEach((old) => old.remove());
  $("over").append(...sure.map(({ class: name, score, box: [x1, y1, x2, y2] }, i) => {
    const colour = colours[classes.indexOf(name)], made = element("div", "", "box"), label = patch(String(i + 1), colour);
    label.append(element("span", ` ${name} ${Math.round(100 * score)}`));
    made.append(label);
    made.setAttribute("aria-hidden", "true");  // the table says it
    Object.assign(made.style, { left: 100 * x1 / width + "%", top: 100 * y1 / height + "%", borderColor: colour,
      width: 100 * (x2 - x1) / width + "%", height: 100 * (y2 - y1) / height + "%", zIndex: sure.length - i });
    if (y1 / height < 0.06) made.classList.add("high");  // no room above it
    return made;
  }));
  $("found").replaceChildren(...sure.map(({ class: name, score, box }, i) => {
    const row = element("tr"), number = element("th");
    number.scope = "row";
    number.append(patch(String(i + 1), colours[classes.indexOf(name)]));
    row.append(number, element("td", name, "name"), element("td", percent(score), "number"),
      ...box.map((value) => element("td", value.toFixed(0), "number")));
    const lit = $("over").querySelectorAll(".box")[i];
    row.addEventListener("pointerenter", () => lit.classList.add("lit"));
    row.addEventListener("pointerleave", () => lit.classList.remove("lit"));
    return row;
  }));
  return `It finds: ${counted(sure, classes)}.`;
}

function showBoxes(said, picture, model) {
  showOver(picture, [["no."], ["class"], ["score", "number"], ...["left", "top", "right", "bottom"].map((side) => [side, "number"])]);
  $("marked-words").textContent = `Boxes in pixels of your picture, ${said.width} x ${said.height}.`;
  $("least-part").hidden = false;
  $("least").oninput = () => { $("status").textContent = drawBoxes(said, model); };
  return drawBoxes(said, model);
}

function showMask({ classes: parts, mask }, picture, { classes, colours }) {
  showOver(picture, [["class"], ["share", "number"], [""]]);
  const drawn = element("img");
  drawn.id = "mask";
  drawn.src = mask;
  drawn.alt = "";
  $("over").append(drawn);
  $("marked-words").textContent = `Each class in its colour; ${classes[0]} as it is.`;
  $("answer").textContent = parts[0].class;
  $("found").replaceChildren(...parts.map(({ class: name, share }) => {
    const row = element("tr"), head = element("th"), strip = element("td");
    head.scope = "row";
    head.append(...(name === classes[0] ? [] : [patch("", colours[classes.indexOf(name)]), " "]), name);
    strip.append(bar(share));
    row.append(head, element("td", percent(share), "number"), strip);
    return row;
  }));
  return `It says: ${parts.slice(0, 3).map(({ class: name, share }) => `${percent(share)} ${name}`).join(", ")}.`;
}

const views = {
  classify: { path: "/predict?top=5", show: showScores, explain: showReasons },
  detect: { path: "/predict?score=0.05", show: showBoxes },
  segment: { path: "/predict", show: showMask },
};
