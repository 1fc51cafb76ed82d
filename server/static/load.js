// What the server is doing: its slots, its queue and its pace over the last minute, from /status.

import { authorized } from "./key.js";

const $ = (id) => document.getElementById(id);
const SPAN_S = 60;

function draw(samples, now) {
  const most = Math.max(1, ...samples.map((s) => s.slots));
  const longest = Math.max(4, ...samples.map((s) => s.jobs_waiting));
  const point = (s, height) => `${(SPAN_S - (now - s.time)).toFixed(2)},${(20 - 19 * height).toFixed(2)}`;
  const line = (height) => samples.map((s) => point(s, height(s)));
  const used = line((s) => s.slots_used / most);
  const start = used[0].split(",")[0];
  $("used").setAttribute("d", `M${start},20L${used.join("L")}V20Z`);
  $("waiting").setAttribute("d", `M${line((s) => s.jobs_waiting / longest).join("L")}`);
}

function tell({ slots, slots_used, jobs_waiting, step_s, image_steps_per_s }) {
  const step_ms = 1000 * step_s;
  $("slots").textContent = `${slots_used} of ${slots}`;
  $("queue").textContent = jobs_waiting;
  $("step").textContent = step_s ? `${step_ms.toFixed(step_ms < 10 ? 1 : 0)} ms` : "–";
  $("rate").textContent = image_steps_per_s ? `${Math.round(image_steps_per_s)}/s` : "–";
}

export async function watchLoad() {
  let samples = [];
  for (;; await new Promise((done) => setTimeout(done, 1000))) {
    if (document.visibilityState !== "visible") continue;
    const answer = await fetch("status", authorized()).catch(() => null); // the header says it when nobody answers
    if (answer?.status === 401) $("load").hidden = true; // until there is a key
    if (!answer?.ok) continue;
    const time = performance.now() / 1000;
    const sample = { ...(await answer.json()), time };
    tell(sample);
    samples = [...samples.filter((s) => time - s.time < SPAN_S), sample];
    draw(samples, time);
    $("load").hidden = false;
  }
}
