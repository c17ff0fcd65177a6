"use strict";
// Shows the answers of each task; everything that comes from the service is inserted as text, never as HTML.
const $ = (id) => document.getElementById(id);
const percent = (score) => (100 * score).toFixed(1) + " %";

const element = (tag, text = "", className = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
};

const bar = (share) => {
  const frame = element("div", "", "bar"), fill = element("i");
  fill.style.width = 100 * share + "%";
  frame.append(fill);
  return frame;
};

// A classifier: the classes with bars, then the heat map and the effect of each block.

function showScores({ top, labels, none_of_these }, image, { calibrated }) {  // labels: of a model that gives several classes
  const answer = none_of_these ? "none of these" : labels ? labels.join(", ") : top[0].class;
  $("answer").textContent = answer;
  $("scores").replaceChildren(...top.map(({ class: name, score }) => {
    const row = element("li"), label = element("div");
    label.append(element("b", name), element("span", percent(score)));
    row.append(label, bar(score));
    return row;
  }));
  $("calibrated").textContent = labels ? "Each class has a score of its own; the answer is the classes over their thresholds."
    : calibrated ? "Calibrated: of many images with a score of 80 %, about 80 % are classified correctly."
    : "Not calibrated: this model has no temperature, so its scores may be overconfident.";
  $("image").src = image;
  $("heat").hidden = true;
  $("heat-caption").textContent = "computing the heat map …";
  $("why").hidden = true;
  $("scored").hidden = false;
  return none_of_these || labels ? `Prediction: ${answer}.` : `Prediction: ${answer}, ${percent(top[0].score)}.`;
}

function showExplanation({ top, heat, blocks }) {
  $("heat").src = heat;
  $("heat").alt = `Heat map over the middle of the image: the evidence for ${top[0].class}`;
  $("heat").hidden = false;
  $("heat-caption").textContent = "heat map (Grad-CAM)";
  $("blocks").replaceChildren(...blocks.map((block) => {
    const row = element("tr", "", block.answer_without !== null && block.answer_without !== top[0].class ? "changed" : "");
    const name = element("th", block.block, "mono"), strip = element("td");
    name.scope = "row";
    if (block.score_without !== null) strip.append(bar(block.score_without));
    row.append(name, element("td", block.ratio === null ? "–" : block.ratio.toFixed(2), "number"), strip,
      element("td", block.score_without === null ? "–" : percent(block.score_without), "number"),
      element("td", block.answer_without ?? "cannot be left out", "name"));
    return row;
  }));
  $("without-head").textContent = `score of ${top[0].class} without it`;
  $("why").hidden = false;
}

// Detectors and segmenters: boxes or a mask over the image, and the same in a table.

function textColour(colour) {  // black or white, whichever has more contrast with a colour
  const [r, g, b] = [1, 3, 5].map((at) => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

function patch(text, colour) {
  const node = element("span", text, "patch");
  node.style.background = colour;
  node.style.color = textColour(colour);
  return node;
}

function showAnnotated(image, headings) {
  $("annotated-image").src = image;
  $("overlay").querySelectorAll("#mask, .box").forEach((old) => old.remove());
  $("table-head").replaceChildren(...headings.map(([text, className]) => {
    const node = element("th", text, className);
    node.scope = "col";
    return node;
  }));
  $("annotated").hidden = false;
}

const countByClass = (boxes, classes) => classes.map((name) => [boxes.filter((box) => box.class === name).length, name])
  .filter(([n]) => n).map(([n, name]) => `${n.toLocaleString("en")} ${name}`).join(", ") || "nothing";

function drawBoxes({ boxes, width, height }, { classes, colours }) {
  const minScore = Number($("min-score").value) / 100, kept = boxes.filter((box) => box.score >= minScore);
  $("min-score-value").textContent = `${$("min-score").value} %`;
  $("answer").textContent = countByClass(kept, classes);
  $("overlay").querySelectorAll(".box").forEach((old) => old.remove());
  $("overlay").append(...kept.map(({ class: name, score, box: [x1, y1, x2, y2] }, i) => {
    const colour = colours[classes.indexOf(name)], frame = element("div", "", "box"), label = patch(String(i + 1), colour);
    label.append(element("span", ` ${name} ${Math.round(100 * score)}`));
    frame.append(label);
    frame.setAttribute("aria-hidden", "true");  // the table has the same content
    Object.assign(frame.style, { left: 100 * x1 / width + "%", top: 100 * y1 / height + "%", borderColor: colour,
      width: 100 * (x2 - x1) / width + "%", height: 100 * (y2 - y1) / height + "%", zIndex: kept.length - i });
    if (y1 / height < 0.06) frame.classList.add("high");  // no room for the label above the box
    return frame;
  }));
  $("table-body").replaceChildren(...kept.map(({ class: name, score, box }, i) => {
    const row = element("tr"), number = element("th");
    number.scope = "row";
    number.append(patch(String(i + 1), colours[classes.indexOf(name)]));
    row.append(number, element("td", name, "name"), element("td", percent(score), "number"),
      ...box.map((value) => element("td", value.toFixed(0), "number")));
    const lit = $("overlay").querySelectorAll(".box")[i];
    row.addEventListener("pointerenter", () => lit.classList.add("lit"));
    row.addEventListener("pointerleave", () => lit.classList.remove("lit"));
    return row;
  }));
  return `Found: ${countByClass(kept, classes)}.`;
}

function showBoxes(prediction, image, model) {
  showAnnotated(image, [["no."], ["class"], ["score", "number"], ...["left", "top", "right", "bottom"].map((side) => [side, "number"])]);
  $("annotated-caption").textContent = `Boxes in pixels of your image, ${prediction.width} x ${prediction.height}.`;
  $("min-score-control").hidden = false;
  $("min-score").oninput = () => { $("status").textContent = drawBoxes(prediction, model); };
  return drawBoxes(prediction, model);
}

function showMask({ classes: shares, mask }, image, { classes, colours }) {
  showAnnotated(image, [["class"], ["share", "number"], [""]]);
  const overlay = element("img");
  overlay.id = "mask";
  overlay.src = mask;
  overlay.alt = "";
  $("overlay").append(overlay);
  $("annotated-caption").textContent = `Each class in its colour; ${classes[0]} is not coloured.`;
  $("answer").textContent = shares[0].class;
  $("table-body").replaceChildren(...shares.map(({ class: name, share }) => {
    const row = element("tr"), head = element("th"), strip = element("td");
    head.scope = "row";
    head.append(...(name === classes[0] ? [] : [patch("", colours[classes.indexOf(name)]), " "]), name);
    strip.append(bar(share));
    row.append(head, element("td", percent(share), "number"), strip);
    return row;
  }));
  return `Prediction: ${shares.slice(0, 3).map(({ class: name, share }) => `${percent(share)} ${name}`).join(", ")}.`;
}

const views = {
  classify: { path: "predict?top=5", show: showScores, explain: showExplanation },
  detect: { path: "predict?min_score=0.05", show: showBoxes },
  segment: { path: "predict", show: showMask },
};
