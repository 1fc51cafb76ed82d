// The form: what each model allows, the request it stands for, and refusals told at the field they are about.

const form = document.getElementById("form");
let models = [];

function fill(select, words, chosen) {
  select.replaceChildren(...words.map((word) => new Option(word || "as trained", word, false, word === chosen)));
}

/** What `GET /models` answers: models and those that are refused, which is the default, how many pictures there may be. */
export function offer({ models: listed, refused = [], default: preferred, max_n = form.n.max }) {
  const first = models.length === 0;
  models = listed;
  fill(form.model, models.map((model) => model.name), form.model.value || preferred || models[0]?.name);
  for (const { name } of refused) form.model.append(Object.assign(new Option(name), { disabled: true }));
  const reasons = refused.map(({ name, reason }) => `${name} is refused: ${reason}`);
  document.getElementById("refused").textContent = reasons.join("\n");
  form.n.max = max_n;
  if (first) form.n.value = Math.min(form.n.value, max_n);
  modelChosen(first);
}

function modelChosen(anew) {
  const model = models.find(({ name }) => name === form.model.value);
  if (!model) return;
  form.steps.max = model.T;
  if (anew) form.steps.value = model.default_steps;
  if (anew) form.clip.checked = model.clip;
  fill(form.sampler, model.samplers, model.samplers.includes(form.sampler.value) ? form.sampler.value : "ddpm");
  fill(form.variance, ["", ...model.variances], form.variance.value);
  fill(form.spacing, model.spacings, anew ? model.spacing : form.spacing.value);
  samplerChosen();
}

/** Fields of other samplers are neither shown nor checked. */
function samplerChosen() {
  for (const label of form.querySelectorAll("[data-for]")) {
    label.hidden = label.dataset.for !== form.sampler.value;
    label.querySelector("input, select").disabled = label.hidden;
  }
}

export function request() {
  const { model, seed, steps, n, sampler, spacing, clip, eta, variance } = form;
  const body = { model: model.value, seed: +seed.value, steps: +steps.value, n: +n.value };
  Object.assign(body, { sampler: sampler.value, spacing: spacing.value, clip: clip.checked });
  if (sampler.value === "ddim") body.eta = +eta.value;
  if (sampler.value === "ddpm" && variance.value) body.variance = variance.value;
  return body;
}

export function show(asked) {
  form.model.value = asked.model;
  modelChosen(false);
  for (const name of ["seed", "steps", "n", "sampler", "spacing"]) form[name].value = asked[name];
  form.eta.value = asked.eta ?? 0;
  form.variance.value = asked.variance ?? "";
  form.clip.checked = asked.clip;
  samplerChosen();
}

export function roll() {
  [form.seed.value] = crypto.getRandomValues(new Uint32Array(1));
}

export function clear() {
  for (const field of form.elements) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  for (const wrong of form.querySelectorAll(".wrong")) wrong.remove();
}

/** Tells each error at its field, and goes to the first. Those that have no field here are given back. */
export function refuse(errors) {
  const rest = [];
  for (const { pointer, message } of errors) {
    const field = form.elements[pointer.slice(1).split("/")[0]];
    if (!field || field.disabled) { rest.push(message); continue; }
    const wrong = document.createElement("small");
    Object.assign(wrong, { className: "wrong", id: `wrong-${field.name}`, textContent: message });
    field.closest("label").append(wrong);
    field.ariaInvalid = "true";
    field.setAttribute("aria-describedby", wrong.id);
  }
  form.querySelector("[aria-invalid]")?.focus();
  return rest;
}

form.model.addEventListener("change", () => modelChosen(true));
form.sampler.addEventListener("change", samplerChosen);
