// The label of a conditional model: a button for each of a few, a field with completion for many, and guidance.

const $ = (id) => document.getElementById(id);
const FEW = 16; // labels that have a button each
const RANDOM = "random", NONE = "no label";
const field = document.querySelector("#many input");
let known = null;
let words = new Map(); // what each label is called here
let mixed = null; // the labels of a job that is shown, if they differ, until another is chosen
let strength = 1; // of guidance: the slider has coarser steps
let interval = null; // of guidance, of a job that is shown, until something else is chosen

/** Two labels may have one name, and a label's number may be another's name. */
function call({ names, count, null: none }) {
  const of = new Map(names.map(({ label, name }) => [label, name])), often = new Map();
  for (const { name } of names) often.set(name, (often.get(name) ?? 0) + 1);
  words = new Map();
  for (let label = 0; label < count + (none === null ? 0 : 1); label++) {
    if (label === none) continue;
    const name = of.get(label), number = often.has(String(label)) ? `label ${label}` : String(label);
    words.set(label, often.get(name) === 1 ? name : number);
  }
}

function choices() {
  const own = known.count > FEW ? known.names.map(({ label }) => words.get(label)) : words.values();
  return [RANDOM, ...(known.null === null ? [] : [NONE]), ...own];
}

/** What `GET /models` tells of a model's labels; null if it knows none. */
export function offerLabels(labels) {
  const before = known;
  known = labels;
  $("labels").hidden = $("labels").disabled = labels === null;
  if (labels === null || JSON.stringify(before) === JSON.stringify(labels)) return;
  call(labels);
  const few = labels.count <= FEW, offered = choices();
  $("few").hidden = !few;
  $("many").hidden = few;
  $("names").replaceChildren(...(few ? [] : offered.map((word) => new Option(word))));
  $("few").replaceChildren(...(few ? offered.map(button) : []));
  strengthen(labels.guidance);
  choose(RANDOM);
}

function button(word) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "few-label", value: word });
  input.addEventListener("change", () => choose(word));
  label.append(input, word);
  return label;
}

function choose(word) {
  mixed = interval = null;
  field.value = word;
  for (const input of $("few").querySelectorAll("input")) input.checked = input.value === word;
  settle();
}

function strengthen(guidance) {
  strength = guidance;
  $("guidance").max = Math.max(8, guidance);
  $("guidance").value = guidance;
}

/** Guidance is for pictures with a label, of a model that knows what it is to have none. */
function settle() {
  const applies = known?.null !== null && field.value.trim() !== NONE;
  $("mixed").hidden = mixed === null;
  $("strength").hidden = $("guidance").disabled = !applies;
  $("guidance-says").textContent = strength === 1 ? "1, which is none" : `${strength}, at twice the work`;
}

/** The fields of a request for so many pictures. */
export function labelFields(n) {
  const word = field.value.trim();
  if (known === null || word === NONE || (word === "" && mixed === null)) return {};
  const label = [...words].find(([, each]) => each === word)?.[0] ?? word;
  const asked = mixed ? { labels: Array.from({ length: n }, (_, i) => mixed[i % mixed.length]) } : { label };
  if ($("guidance").disabled) return asked;
  return { ...asked, guidance: strength, ...(interval && strength !== 1 ? { guidance_interval: interval } : {}) };
}

/** Shows what a job was asked for. */
export function showLabels({ labels, guidance, guidance_interval }) {
  if (known === null) return;
  if (typeof guidance === "number") strengthen(guidance);
  const first = labels?.[0], alike = labels?.every((label) => label === first);
  choose(labels ? (alike ? words.get(first) : "") : NONE);
  if (labels && !alike) mixed = labels;
  interval = guidance_interval ?? null;
  settle();
}

$("guidance").addEventListener("input", () => {
  strength = +$("guidance").value;
  interval = null;
  settle();
});
field.addEventListener("input", () => choose(field.value));
