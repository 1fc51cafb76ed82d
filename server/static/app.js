// The page. It uses the same public API as everybody; no build step, no framework.

import { Refused, ask, sentence, submit, wait } from "./api.js";
import * as form from "./form.js";
import { askForKey, authorized } from "./key.js";
import { watchLoad } from "./load.js";
import * as past from "./past.js";
import { Stage } from "./stage.js";
import { copy, recipes, saveGif, savePngs } from "./take.js";
import { Watch } from "./watch.js";

const $ = (id) => document.getElementById(id);
let stage = null;
let watch = null; // the job on the stage is watch.job; it may have ended
let asking = null; // {givenUp}: a request on its way to become a job

/** What goes on, in words. They are read aloud, so each once. */
function say(text) {
  if ($("words").textContent !== text) $("words").textContent = text;
}

const isBusy = () => asking !== null || (watch !== null && !watch.over);

function complain(refusal) {
  if (!(refusal instanceof Refused)) throw refusal;
  const rest = form.refuse(refusal.errors);
  if (refusal.errors.length > rest.length) rest.push("The server refused what is marked above");
  else rest.unshift(refusal.message);
  if (refusal.retryAfter_s) rest.push(`Try again in ${refusal.retryAfter_s} s`);
  $("trouble").textContent = [...new Set(rest)].map(sentence).join(" ");
}

function settle() {
  $("build").ariaDisabled = String(isBusy());
  $("cancel").disabled = !isBusy();
  const made = watch !== null && watch.over && watch.job.status === "succeeded";
  $("png").disabled = $("gif").disabled = !made;
  $("past").hidden = past.entries().length === 0;
  past.list($("history"), watch?.job.id, again);
}

// --- a job on the stage

function show(job) {
  watch?.stop();
  stage?.leave();
  past.setCurrent(job);
  $("empty").hidden = true;
  $("site").hidden = false;
  $("progress").value = 0;
  say("");
  $("where").textContent = "";
  $("png").textContent = job.request.n > 1 ? `Save ${job.request.n} PNGs` : "Save PNG";
  recipes(job.request);
  const shown = (stage = new Stage(job.request));
  watch = new Watch(job, {
    say,
    progress({ step, steps, eta_s }) {
      $("progress").value = step / steps;
      const left = eta_s > 0 ? `, about ${Math.ceil(eta_s)} s left` : "";
      $("where").textContent = `${step} of ${steps} steps${left}`;
    },
    picture: (header, bytes) => shown.add(header, bytes),
    replaced(made) {
      past.remember(made, "running");
      past.setCurrent(made);
      settle();
    },
    async ended(status, text, ended) {
      watch.job = { ...ended, status };
      shown.settle();
      say(text);
      $("where").textContent = "";
      if (status === "succeeded") $("progress").value = 1;
      settle();
      past.remember(ended, status, await past.thumbnail(shown.newest("image", 0) ?? shown.newest("x0", 0)));
      settle();
    },
  });
  settle();
}

async function make(request) {
  if (isBusy()) return;
  const mine = (asking = { givenUp: false });
  form.clear();
  $("trouble").textContent = "";
  settle();
  let job = null;
  try {
    job = await submit(request, (text) => { $("trouble").textContent = text; }, () => mine.givenUp);
    $("trouble").textContent = "";
  } catch (refusal) {
    complain(refusal);
  } finally {
    asking = null;
  }
  if (mine.givenUp) say("Cancelled"); // before it was a job that could say so
  if (!job) return settle();
  past.remember(job, job.status);
  show(job);
  $("stage").focus({ preventScroll: true }); // where all keys are at hand
  if (matchMedia("(max-width: 48rem)").matches) $("stage").scrollIntoView();
}

/** A job of before. One that the server has lost is made again by its watch, and has the same bytes. */
function again(entry) {
  form.clear();
  $("trouble").textContent = "";
  form.show(entry.request);
  show(entry);
}

async function cancel() {
  if (asking) asking.givenUp = true;
  else if (watch && !watch.over) {
    const mine = watch;
    try {
      await ask(`jobs/${mine.job.id}`, { method: "DELETE" }); // the stream tells the rest
    } catch (refusal) {
      const unheard = refusal.status !== 404 && refusal.status !== 410;
      mine.end("cancelled", unheard ? "Not watched any more; the server could not be told to cancel" : "Cancelled");
    }
  }
}

/** After a reload: the job that was on the stage, made again if it had not ended and the server has lost it. */
async function resume() {
  const entry = past.current();
  if (!entry) return;
  const known = await fetch(`jobs/${entry.id}`, authorized()).then((answer) => answer.ok, () => true);
  if (known || !past.hasEnded(entry)) again(entry);
}

// --- the server

async function lookAround() {
  for (let ready = false, resumed = false; ; await wait(ready ? 3 : 0.7)) {
    if (ready && document.visibilityState !== "visible") continue;
    const was = ready;
    let needsKey = false;
    try {
      await ask("readyz");
      if (!was) form.offer(await (await ask("models")).json());
      $("api").hidden = false;
      ready = true;
      $("state").textContent = "ready";
    } catch (refusal) {
      ready = false;
      needsKey = refusal.status === 401;
      const why = refusal.status ? refusal.message : "the server does not answer; trying again";
      $("state").textContent = needsKey ? "waiting for your key" : why;
    }
    $("state").dataset.ready = ready;
    if (needsKey) await askForKey();
    if (ready && !resumed) { resumed = true; await resume(); }
  }
}

// --- hands

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { target, key } = event;
  const writes = target.matches("input:not([type=range]), select, textarea");
  const acts = target.closest("button, a, summary, pre");
  const scrubs = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (key === "Escape") cancel();
  else if (writes) return;
  else if (key === "r" || key === "R") form.roll();
  else if (key === "Enter" && !acts) $("form").requestSubmit();
  else if (key === " " && !acts) stage?.toggle();
  else if (scrubs && stage && target !== $("scrub")) { stage.pause(); stage.go(stage.place + scrubs); }
  else return;
  event.preventDefault();
}

function drawNoise() {
  const context = $("noise").getContext("2d");
  const picture = context.createImageData(32, 32);
  for (let i = 0; i < picture.data.length; i += 4) {
    const normal = Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
    picture.data.fill(127.5 + 127.5 * normal, i, i + 3);
    picture.data[i + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); make(form.request()); });
$("dice").addEventListener("click", form.roll);
$("cancel").addEventListener("click", cancel);
$("scrub").addEventListener("input", () => { stage.pause(); stage.go(+$("scrub").value); });
$("play").addEventListener("click", () => stage.toggle());
$("png").addEventListener("click", () => savePngs(stage.tiles));
$("gif").addEventListener("click", () => saveGif(watch.job.id, watch.job.request.seed).catch(complain));
$("forget").addEventListener("click", () => { past.forget(); settle(); });
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
document.addEventListener("keydown", pressed);
drawNoise();
settle();
lookAround();
watchLoad();
