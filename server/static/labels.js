// The label of a conditional model: a button for each of a few, a field with completion for many, and guidance.

const $ = (id) => document.getElementById(id);
const FEW = 16; // labels that have a button each
const RANDOM = "random", NONE = "no label";
const field = document.querySelector("#many input");
let known = null;
let mixed = null; // the labels and the seed of a job that is shown, if the labels differ

const named = (label) => known.names.find((each) => each.label === label)?.name ?? String(label);

function choices() {
  const numbers = Array.from({ length: known.count + (known.null === null ? 0 : 1) }, (_, label) => label);
  const own = known.count > FEW ? known.names.map(({ name }) => name) : numbers.filter((label) => label !== known.null).map(named);
  return [RANDOM, ...(known.null === null ? [] : [NONE]), ...own];
}

/** What `GET /models` tells of a model's labels; null if it knows none. */
export function offerLabels(labels) {
  const before = known;
  known = labels;
  $("labels").hidden = $("labels").disabled = labels === null;
  if (labels === null || JSON.stringify(before) === JSON.stringify(labels)) return;
  const few = labels.count <= FEW, words = choices();
  $("few").hidden = !few;
  $("many").hidden = few;
  $("names").replaceChildren(...(few ? [] : words.map((word) => new Option(word))));
  $("few").replaceChildren(...(few ? words.map(button) : []));
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
  mixed = null;
  field.value = word;
  for (const input of $("few").querySelectorAll("input")) input.checked = input.value === word;
  settle();
}

function strengthen(guidance) {
  $("guidance").max = Math.max(8, guidance);
  $("guidance").value = guidance;
}

/** Guidance is for pictures with a label, of a model that knows what it is to have none. */
function settle() {
  const applies = known?.null !== null && field.value.trim() !== NONE;
  $("strength").hidden = $("guidance").disabled = !applies;
  const strength = +$("guidance").value;
  $("guidance-says").textContent = strength === 1 ? "1, which is none" : `${strength}, at twice the work`;
}

/** The fields of a request for so many pictures from this seed on. */
export function labelFields(n, seed) {
  const word = field.value.trim();
  if (known === null || word === NONE || word === "") return {};
  const own = known.names.find(({ name }) => name === word)?.label;
  const label = own ?? (/^[0-9]{1,6}$/.test(word) ? +word : word);
  const again = mixed?.seed === seed && mixed.labels.length === n;
  const asked = again ? { labels: mixed.labels } : { label };
  return $("guidance").disabled ? asked : { ...asked, guidance: +$("guidance").value };
}

/** Shows what a job was asked for. */
export function showLabels({ labels, guidance, seed }) {
  if (known === null) return;
  if (guidance) strengthen(guidance);
  const first = labels?.[0], alike = labels?.every((label) => label === first);
  choose(labels ? (alike ? named(first) : RANDOM) : NONE);
  if (labels && !alike) mixed = { labels, seed };
}

$("guidance").addEventListener("input", settle);
field.addEventListener("input", () => choose(field.value));
