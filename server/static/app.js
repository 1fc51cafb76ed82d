// The viewer: it uses the same public API as everybody. No build step, no framework.

const $ = (id) => document.getElementById(id);
const form = $("form");
const MAX_SEED = 2 ** 53 - 64;
const KEPT_JOBS = 24;
let models = [];
let shown = null; // the job on the stage

// --- choices -------------------------------------------------------------------------------------------------------

function fill(select, words, chosen) {
  select.replaceChildren(...words.map((word) => new Option(word, word, false, word === chosen)));
}

function modelChosen() {
  const model = models.find((m) => m.name === form.model.value);
  if (!model) return;
  form.steps.max = model.T;
  form.steps.value = Math.min(form.steps.value, model.T);
  $("most").textContent = `of ${model.T}`;
  fill(form.sampler, model.samplers, form.sampler.value || "ddpm");
  fill(form.variance, ["", ...model.variances], form.variance.value);
  form.variance.options[0].text = "as trained";
  fill(form.spacing, model.spacings, model.spacing);
  form.clip.checked = model.clip;
  samplerChosen();
}

function samplerChosen() {
  for (const label of form.querySelectorAll("[data-for]")) label.hidden = label.dataset.for !== form.sampler.value;
}

function request() {
  const body = {
    model: form.model.value, seed: +form.seed.value, steps: +form.steps.value, n: +form.n.value,
    sampler: form.sampler.value, spacing: form.spacing.value, clip: form.clip.checked,
  };
  if (body.sampler === "ddim") body.eta = +form.eta.value;
  if (body.sampler === "ddpm" && form.variance.value) body.variance = form.variance.value;
  return body;
}

// --- a job on the stage --------------------------------------------------------------------------------------------

class Shown {
  constructor(job) {
    this.job = job;
    this.seq = 0;
    this.frames = []; // by picture: step -> {x_t, x0}
    this.images = [];
    this.steps = [0];
    this.follows = true; // the scrubber stays at the newest frame until somebody moves it
    this.ended = false;
    $("stage").hidden = false;
    $("tiles").replaceChildren(...Array.from({ length: job.request.n }, (_, i) => this.tile(i)));
    this.scrub();
    this.sayHow();
    this.listen();
  }

  tile(i) {
    const figure = document.createElement("figure");
    figure.innerHTML = "<div><img alt='noisy picture'><img alt='predicted picture'></div>" +
      "<figcaption><span></span><span>x_t · x̂₀</span></figcaption>";
    figure.querySelector("span").textContent = `seed ${this.job.request.seed + i}`;
    return figure;
  }

  listen() {
    const socket = new WebSocket(new URL(`jobs/${this.job.id}/stream?after=${this.seq}`, location).href.replace(/^http/, "ws"));
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.hear(JSON.parse(data)) : this.see(data));
    socket.onclose = ({ code }) => {
      if (this.ended || shown !== this) return;
      if (code === 4404) return this.end("This job is not kept any more.");
      $("where").textContent = "The connection was lost; trying again …";
      setTimeout(() => shown === this && !this.ended && this.listen(), 1000);
    };
  }

  leave() {
    this.ended = true;
    this.socket.close();
    for (const at of this.frames) for (const pair of Object.values(at ?? {})) Object.values(pair).map(URL.revokeObjectURL);
    this.images.map(URL.revokeObjectURL);
  }

  hear(message) {
    this.seq = message.seq ?? this.seq;
    const left = message.eta_s > 0 ? `, about ${Math.ceil(message.eta_s)} s left` : "";
    switch (message.type) {
      case "queued": $("where").textContent = `Waiting behind ${message.position} others${left}`; break;
      case "progress":
        $("where").textContent = `${message.step} of ${message.steps} image-steps, t = ${message.t}${left}`;
        $("progress").value = message.step / message.steps;
        break;
      case "restarting": $("where").textContent = "The engine is being replaced; the same picture starts again."; break;
      case "succeeded":
        $("progress").value = 1;
        remember(message.document, this.images[0]);
        this.end(`Built in ${(message.document.finished_at - message.document.created_at).toFixed(1)} s`);
        break;
      case "cancelled": this.end("Cancelled."); break;
      case "failed": this.end(`Failed: ${message.document.error?.detail ?? "for an unknown reason"}`); break;
    }
  }

  see(data) {
    const length = new DataView(data).getUint32(4);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, length)));
    const url = URL.createObjectURL(new Blob([new Uint8Array(data, 8 + length)], { type: header.image_type }));
    this.seq = header.seq;
    if (header.kind === "image") {
      this.images[header.index] = url;
    } else {
      ((this.frames[header.index] ??= {})[header.step] ??= {})[header.kind] = url;
      if (!this.steps.includes(header.step)) this.steps = [...this.steps, header.step].sort((a, b) => a - b);
    }
    if (this.follows) this.place = this.steps.length - 1;
    this.scrub();
  }

  scrub() {
    const last = this.steps.length - 1;
    this.place = Math.min(this.place ?? last, last);
    $("scrub").max = last;
    $("scrub").value = this.place;
    const ends = this.place === last && this.images.length > 0;
    [...$("tiles").children].forEach((tile, i) => {
      const at = this.steps.slice(0, this.place + 1).findLast((step) => this.frames[i]?.[step]?.x_t);
      const pair = this.frames[i]?.[at] ?? {};
      const [noisy, clean] = tile.querySelectorAll("img");
      const picture = ends ? this.images[i] : undefined;
      if (picture ?? pair.x_t) noisy.src = picture ?? pair.x_t;
      if (picture ?? pair.x0 ?? pair.x_t) clean.src = picture ?? pair.x0 ?? pair.x_t;
      tile.querySelector("span:last-child").textContent = picture ? "x_0" : `x_t · x̂₀ after ${at ?? 0}`;
    });
  }

  end(words) {
    this.ended = true;
    $("where").textContent = words;
    $("cancel").disabled = true;
    $("build").disabled = false;
    if (this.images.length === 0) return;
    const links = this.images.slice(0, 8).map((_, i) => link(`jobs/${this.job.id}/images/${i}`, `${this.job.request.seed + i}.png`));
    const gif = document.createElement("button");
    gif.type = "button";
    gif.textContent = "GIF of the denoising";
    gif.onclick = () => saveGif(this.job.id);
    $("take").replaceChildren(...links, gif);
  }

  sayHow() {
    $("take").replaceChildren();
    const { frames, priority, deadline_s, ...rest } = this.job.request;
    const body = JSON.stringify(Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== null)));
    const url = new URL("generate", location).href;
    $("curl").textContent = `curl -X POST ${url} -H 'content-type: application/json' -d '${body}' -o out.png`;
    $("python").textContent = `import json, urllib.request\n\nbody = ${JSON.stringify(body)}.encode()\n` +
      `ask = urllib.request.Request("${url}", body, {"content-type": "application/json"})\n` +
      `open("out.png", "wb").write(urllib.request.urlopen(ask).read())`;
  }
}

function link(href, name) {
  const a = document.createElement("a");
  Object.assign(a, { href, download: name, textContent: name });
  return a;
}

async function saveGif(id) {
  const answer = await fetch(`jobs/${id}/trajectory`, { headers: { accept: "image/gif" } });
  if (!answer.ok) return trouble(answer);
  const a = link(URL.createObjectURL(await answer.blob()), `${id}.gif`);
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}

async function trouble(answer) {
  const problem = await answer.json().catch(() => ({}));
  $("trouble").textContent = problem.detail ?? `The server answered ${answer.status}.`;
}

function show(job) {
  shown?.leave();
  shown = new Shown(job);
}

async function build(event) {
  event.preventDefault();
  $("trouble").textContent = "";
  const body = request();
  const points = Math.min(30, Math.floor(2048 / body.n));
  body.frames = { count: Math.max(2, points), kind: "both" };
  const headers = { "content-type": "application/json", prefer: "respond-async" };
  let answer;
  try {
    answer = await fetch("generate", { method: "POST", headers, body: JSON.stringify(body) });
  } catch {
    $("trouble").textContent = "The server does not answer.";
    return;
  }
  if (!answer.ok) return trouble(answer);
  $("build").disabled = true;
  $("cancel").disabled = false;
  $("progress").value = 0;
  show(await answer.json());
}

// --- what was made before ------------------------------------------------------------------------------------------

const past = () => JSON.parse(localStorage.getItem("jobs") ?? "[]");

function remember(job) {
  const entry = { id: job.id, text: `${job.request.sampler} ${job.request.steps}, seed ${job.request.seed}` };
  localStorage.setItem("jobs", JSON.stringify([entry, ...past().filter((e) => e.id !== job.id)].slice(0, KEPT_JOBS)));
  history();
}

function history() {
  $("history").replaceChildren(...past().map(({ id, text }) => {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    const image = button.appendChild(new Image());
    Object.assign(image, { src: `jobs/${id}/images/0`, alt: "", loading: "lazy" });
    image.onerror = () => item.remove(); // it is not kept any more
    button.append(text);
    button.onclick = async () => {
      const answer = await fetch(`jobs/${id}`);
      if (answer.ok) show(await answer.json());
    };
    return item;
  }));
}

// --- the server ----------------------------------------------------------------------------------------------------

async function lookAround() {
  try {
    const ready = await fetch("readyz");
    const problem = ready.ok ? null : await ready.json();
    $("state").textContent = problem?.detail ?? "ready";
    if (ready.ok && models.length === 0) {
      models = (await (await fetch("models")).json()).models;
      fill(form.model, models.map((m) => m.name));
      form.steps.value = models[0].default_steps;
      modelChosen();
    }
  } catch {
    $("state").textContent = "the server does not answer; trying again";
  }
  setTimeout(lookAround, models.length ? 3000 : 500);
}

form.addEventListener("submit", build);
form.model.addEventListener("change", modelChosen);
form.sampler.addEventListener("change", samplerChosen);
$("dice").addEventListener("click", () => { form.seed.value = Math.floor(Math.random() * MAX_SEED); });
$("cancel").addEventListener("click", () => shown && fetch(`jobs/${shown.job.id}`, { method: "DELETE" }));
$("scrub").addEventListener("input", () => {
  shown.place = +$("scrub").value;
  shown.follows = shown.place === shown.steps.length - 1;
  shown.scrub();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "r" && !event.target.closest("input, select, textarea")) $("dice").click();
});
history();
lookAround();
