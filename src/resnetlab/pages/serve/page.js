"use strict";
// Sends the chosen image to /predict and, for classifiers, to /explain; views.js shows the answers.
let model = null, turn = 0, objectUrl = null;

const showError = (sentence) => {
  $("status").textContent = "";
  $("error").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  $("error").hidden = false;
};

async function post(path, file) {
  const form = new FormData();
  form.append("image", file, file.name || "image");
  let response;
  try {
    response = await fetch(path, { method: "POST", body: form });
  } catch {
    throw new Error("the service cannot be reached; is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `the service answered with status ${response.status}.`);
  return answer;
}

async function predict(file) {
  const mine = ++turn;
  $("error").hidden = true;
  await modelLoaded;
  if (!model) return showError("the service cannot be reached; is it still running?");
  if (file.size > model.limits.body_bytes - 1000) {
    $("result").hidden = true;
    return showError(`this image has ${(file.size / 1e6).toFixed(1)} MB, more than the limit of ${model.limits.body_bytes / 1e6} MB; make it smaller.`);
  }
  const view = views[model.task];
  $("status").textContent = "Predicting …";
  $("drop").setAttribute("aria-busy", "true");
  try {
    const { predictions } = await post(view.path, file);
    if (mine !== turn) return;
    if (objectUrl) URL.revokeObjectURL(objectUrl);
    objectUrl = URL.createObjectURL(file);
    $("name").textContent = file.name || "pasted image";
    $("status").textContent = view.show(predictions[0], objectUrl, model);
    $("result").hidden = false;
    $("answer").focus({ preventScroll: false });
    if (!view.explain) return;
    const explanation = await post("explain?top=5", file);
    if (mine === turn) view.explain(explanation);
  } catch (error) {
    if (mine !== turn) return;
    if ($("status").textContent === "Predicting …") $("result").hidden = true;
    else $("heat-caption").textContent = "no heat map";
    showError(error.message);
  } finally {
    if (mine === turn) $("drop").removeAttribute("aria-busy");
  }
}

for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", (event) => {
    if (event.target.files.length) predict(event.target.files[0]);
    event.target.value = "";  // the same file can be chosen again
  });
}
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) predict(file); else showError("that is not a file; drop an image from your disk.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (file) predict(file); else showError("there is no image in the clipboard.");
});

const modelLoaded = fetch("model").then((response) => response.json()).then((description) => {
  model = description;
  const count = model.classes.length;
  $("about").textContent = `${model.name}, ${count.toLocaleString("en")} ${count === 1 ? "class" : "classes"}: `
    + model.classes.slice(0, 12).join(", ") + (count > 12 ? ", …" : "") + ".";
  $("limits").textContent = `JPEG, PNG, WebP, GIF, BMP or TIFF, up to ${model.limits.body_bytes / 1e6} MB`;
}).catch(() => showError("the service cannot be reached; is it still running?"));
