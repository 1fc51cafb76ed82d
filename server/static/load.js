// What the server is doing: its slots, its queue and its pace over the last minute, from /metrics.

const $ = (id) => document.getElementById(id);
const SPAN_S = 60;
const HIDDEN_BY = [401, 403, 404]; // this server does not show its metrics to us

/** The values of a Prometheus page by name, summed over labels. */
function parse(text) {
  const sums = {};
  for (const [, name, value] of text.matchAll(/^(\w+)(?:\{.*\})? (\S+)/gm)) {
    sums[name] = (sums[name] ?? 0) + Number(value);
  }
  return sums;
}

function draw(samples, now) {
  const most = Math.max(1, ...samples.map((s) => s.ddpm_slots));
  const longest = Math.max(4, ...samples.map((s) => s.ddpm_jobs_waiting));
  const point = (s, height) => `${(SPAN_S - (now - s.time)).toFixed(2)},${(20 - 19 * height).toFixed(2)}`;
  const line = (height) => samples.map((s) => point(s, height(s)));
  const used = line((s) => s.ddpm_slots_used / most);
  const start = used[0].split(",")[0];
  $("used").setAttribute("d", `M${start},20L${used.join("L")}V20Z`);
  $("waiting").setAttribute("d", `M${line((s) => s.ddpm_jobs_waiting / longest).join("L")}`);
}

function tell(now, before) {
  const grown = (name) => (before && now[name] > before[name] ? now[name] - before[name] : 0); // restarts count from 0
  const steps = grown("ddpm_step_seconds_count");
  const step_ms = (1000 * grown("ddpm_step_seconds_sum")) / steps;
  const rate = before ? grown("ddpm_sample_steps_total") / (now.time - before.time) : 0;
  $("slots").textContent = `${now.ddpm_slots_used} of ${now.ddpm_slots}`;
  $("queue").textContent = now.ddpm_jobs_waiting;
  $("step").textContent = steps ? `${step_ms.toFixed(step_ms < 10 ? 1 : 0)} ms` : "–";
  $("rate").textContent = rate ? `${Math.round(rate)}/s` : "–";
}

export async function watchLoad() {
  let samples = [];
  for (;; await new Promise((done) => setTimeout(done, 1000))) {
    if (document.visibilityState !== "visible") continue;
    const answer = await fetch("metrics").catch(() => null); // the header says it when nobody answers
    if (answer && HIDDEN_BY.includes(answer.status)) return void ($("load").hidden = true);
    if (!answer?.ok) continue;
    const time = performance.now() / 1000;
    const sample = { ddpm_slots: 0, ddpm_slots_used: 0, ddpm_jobs_waiting: 0, ...parse(await answer.text()), time };
    tell(sample, samples.at(-1));
    samples = [...samples.filter((s) => time - s.time < SPAN_S), sample];
    draw(samples, time);
    $("load").hidden = false;
  }
}
