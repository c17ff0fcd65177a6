"use strict";
// A picture is chosen, sent to /predict and, where the model explains, to /explain; views.js shows what comes back.
let model = null, turn = 0, shown = null;

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

async function look(file) {
  const mine = ++turn;
  $("error").hidden = true;
  await told;
  if (!model) return fail("the service cannot be reached; is it still running?");
  if (file.size > model.limits.body_bytes - 1000) {
    $("result").hidden = true;
    return fail(`this picture has ${(file.size / 1e6).toFixed(1)} MB, more than the ${model.limits.body_bytes / 1e6} MB that are taken; make it smaller.`);
  }
  const view = views[model.task];
  $("status").textContent = "Looking …";
  $("drop").setAttribute("aria-busy", "true");
  try {
    const { predictions } = await ask(view.path, file);
    if (mine !== turn) return;
    if (shown) URL.revokeObjectURL(shown);
    shown = URL.createObjectURL(file);
    $("name").textContent = file.name || "pasted picture";
    $("status").textContent = view.show(predictions[0], shown, model);
    $("result").hidden = false;
    $("answer").focus({ preventScroll: false });
    if (!view.explain) return;
    const reasons = await ask("/explain?top=5", file);
    if (mine === turn) view.explain(reasons);
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

const told = fetch("/model").then((answer) => answer.json()).then((about) => {
  model = about;
  $("about").textContent = `${model.name}, ${model.classes.length.toLocaleString("en")} classes: `
    + model.classes.slice(0, 12).join(", ") + (model.classes.length > 12 ? ", …" : "") + ".";
  $("limits").textContent = `JPEG, PNG, WebP, GIF, BMP or TIFF, up to ${model.limits.body_bytes / 1e6} MB`;
}).catch(() => fail("the service cannot be reached; is it still running?"));
