// The form: what each model allows, the request it stands for, and refusals told at the field they are about.

import { labelFields, offerLabels, showLabels } from "./labels.js";

const form = document.getElementById("form");
let models = [];

function fill(select, words, chosen, nothing = "as usual") {
  select.replaceChildren(...words.map((word) => new Option(word || nothing, word, false, word === chosen)));
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

const chosenModel = () => models.find(({ name }) => name === form.model.value);

function modelChosen(anew) {
  const model = chosenModel();
  if (!model) return;
  const { presets } = model, preset = form.preset.value;
  fill(form.preset, [...Object.keys(presets), "custom"], preset);
  form.steps.max = model.T;
  offerLabels(model.labels);
  fill(form.sampler, model.samplers, form.sampler.value);
  fill(form.variance, ["", ...model.variances], form.variance.value, "as trained");
  fill(form.spacing, model.spacings, form.spacing.value);
  fill(form.plan, ["", ...model.plans.map(({ name }) => name)], form.plan.value, "none");
  if (anew) spread(presets[preset] ?? presets.full);
  else settle();
}

/** Fills in the fields that only `custom` shows. */
function spread(asked) {
  for (const name of ["plan", "steps", "sampler", "variance"]) form[name].value = asked[name] ?? "";
  form.spacing.value = asked.spacing ?? chosenModel()?.spacing;
  form.eta.value = asked.eta ?? 0;
  form.clip.checked = asked.clip;
  settle();
  form.order.value = asked.order ?? ""; // of those that the sampler has
}

/** Fields that do not apply are neither shown nor checked. */
function settle() {
  const { orders = {}, plans = [], presets = {} } = chosenModel() ?? {}, sampler = form.sampler.value;
  fill(form.order, ["", ...(orders[sampler] ?? []).map(String)], form.order.value);
  const { steps, sampler: by, plan } = presets[form.preset.value] ?? {};
  document.getElementById("stands").textContent = by ? `${steps} steps of ${by}${plan ? `, plan ${plan}` : ""}` : "";
  const custom = form.preset.value === "custom", planned = form.plan.value !== "";
  for (const label of form.querySelectorAll("[data-custom]")) {
    const field = label.querySelector("input, select"), owner = label.dataset.custom;
    const applies = { plan: plans.length > 0, order: orders[sampler]?.length > 1 }[field.name] ?? (!owner || owner === sampler);
    label.hidden = field.disabled = !(custom && applies && (!planned || field.name === "plan"));
  }
}

export function request() {
  const { model, seed, n, preset } = form;
  const body = { model: model.value, seed: +seed.value, n: +n.value, ...labelFields(+n.value) };
  if (preset.value !== "custom") return { ...body, preset: preset.value };
  for (const field of form.querySelectorAll("[data-custom] :is(input, select):enabled")) {
    const isNumber = field.type === "number" || field.name === "order";
    if (field.type === "checkbox") body[field.name] = field.checked;
    else if (field.value !== "") body[field.name] = isNumber ? +field.value : field.value;
  }
  return body;
}

export function show(asked) {
  form.model.value = asked.model;
  modelChosen(false);
  for (const name of ["seed", "n"]) form[name].value = asked[name];
  const stands = (preset) => Object.entries(preset).every(([name, value]) => (asked[name] ?? null) === value);
  const presets = Object.entries(chosenModel()?.presets ?? {});
  showLabels(asked);
  form.preset.value = presets.find(([, preset]) => stands(preset))?.[0] ?? "custom";
  spread(asked);
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
    (field.closest("label") ?? field.closest("fieldset")).append(wrong);
    field.ariaInvalid = "true";
    field.setAttribute("aria-describedby", wrong.id);
  }
  form.querySelector("[aria-invalid]")?.focus();
  return rest;
}

form.model.addEventListener("change", () => modelChosen(true));
form.preset.addEventListener("change", () => {
  const preset = chosenModel()?.presets[form.preset.value];
  preset ? spread(preset) : settle();
});
form.sampler.addEventListener("change", () => {
  const { clip, thresholding, orders } = chosenModel() ?? {};
  form.clip.checked = clip && (Boolean(thresholding) || !orders[form.sampler.value]); // what it does unless told otherwise
  settle();
});
form.plan.addEventListener("change", settle);
