// The label of a conditional model: a button for each of a few, a field with completion for many, and guidance.

const $ = (id) => document.getElementById(id);
const FEW = 16; // labels that have a button each
const RANDOM = "random", NONE = "none";
let known = null;

const named = (label) => known.names.find((each) => each.label === label)?.name ?? String(label);

function choices() {
  const own = known.names.length ? known.names.map(({ name }) => name)
    : Array.from({ length: known.count + 1 }, (_, label) => label).filter((label) => label !== known.null).slice(0, known.count);
  return [RANDOM, ...(known.null === null ? [] : [NONE]), ...own.map(String)];
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
  $("guidance").value = labels.guidance;
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
  const field = document.querySelector("#many input");
  field.value = word;
  for (const input of $("few").querySelectorAll("input")) input.checked = input.value === word;
  settle();
}

/** Guidance is for pictures with a label, of a model that knows what it is to have none. */
function settle() {
  const applies = known?.null !== null && word() !== NONE;
  $("strength").hidden = $("guidance").disabled = !applies;
  const strength = +$("guidance").value;
  $("guidance-says").textContent = strength === 1 ? "1, which is none" : `${strength}, at twice the work`;
}

const word = () => document.querySelector("#many input").value.trim();

/** The fields of a request. */
export function labelFields() {
  if (known === null || word() === NONE || word() === "") return {};
  const own = known.names.find(({ name }) => name === word())?.label;
  const label = own ?? (/^[0-9]{1,6}$/.test(word()) ? +word() : word());
  return { label, ...($("guidance").disabled ? {} : { guidance: +$("guidance").value }) };
}

/** Shows what a job was asked for. */
export function showLabels({ labels, guidance }) {
  if (known === null) return;
  if (guidance !== null && guidance !== undefined) $("guidance").value = guidance;
  const first = labels?.[0];
  const alike = labels?.every((label) => label === first);
  choose(labels ? (alike ? named(first) : RANDOM) : NONE);
}

$("guidance").addEventListener("input", settle);
document.querySelector("#many input").addEventListener("input", settle);
