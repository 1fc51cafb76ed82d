// What `/openapi.json` says, to be read: every path, what may be asked of it and what comes back.

import { askForKey, authorized, hasKey } from "./key.js";

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children); // as text: nothing that the server says is read as HTML
  return made;
}

const link = (text, to) => make("a", { href: `#${to}` }, text);
const code = (text) => make("code", {}, text);
const words = (text = "") => text.split("`").map((part, i) => (i % 2 ? code(part) : part)); // with `code` in them
const prose = (text) => make("p", {}, ...words(text));
const nameOf = ({ $ref }) => $ref.split("/").at(-1);
let said = {}; // the document
const follow = (part) => (part.$ref ? part.$ref.split("/").slice(1).reduce((found, name) => found[name], said) : part);

/** From a to b, or what there is of that. */
function span(schema) {
  const { type, minimum, maximum, exclusiveMinimum, exclusiveMaximum, minLength, maxLength } = schema;
  const from = minimum ?? minLength ?? (exclusiveMinimum === undefined ? "" : `more than ${exclusiveMinimum}`);
  const below = type === "integer" ? exclusiveMaximum - 1 : `less than ${exclusiveMaximum}`;
  const to = maximum ?? maxLength ?? (exclusiveMaximum === undefined ? "" : below);
  if (from === "" && to === "") return "";
  return ` ${from} … ${to}${minLength ?? maxLength ? " characters" : ""}`;
}

/** What a schema allows, in a few words. */
function allowed(schema = {}) {
  if (schema.$ref) return [link(nameOf(schema), nameOf(schema))];
  const kinds = schema.anyOf ?? schema.oneOf;
  if (kinds) return kinds.flatMap((one, i) => [i ? " or " : "", ...allowed(one)]);
  if (schema.const !== undefined) return [`${schema.const}`];
  if (schema.enum) return [schema.enum.join(", ")];
  if (schema.type === "array") return ["list of ", ...allowed(schema.items)];
  return [`${schema.type ?? "anything"}${span(schema)}`];
}

function table(heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, ...[cell].flat()))));
  return make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, head, ...body));
}

const fields = (properties) => table(["field", "allowed", "if not given", ""], Object.entries(properties).map(
  ([name, field]) => [name, allowed(field), `${field["x-default"] ?? ""}`, words(field.description)]));

const parameters = (given) => table(["parameter", "in", "allowed", ""], given.map(follow).map(
  ({ name, in: place, schema, description }) => [name, place, allowed(schema), words(description ?? schema.description)]));

/** The media types of an answer, each with its schema if that has a name. */
const forms = (content) => Object.entries(content).flatMap(([media, { schema }], i) =>
  [i ? ", " : "", media, ...(schema.$ref ? [" (", ...allowed(schema), ")"] : [])]);

const answers = (responses) => table(["answer", "", "as", "headers"], Object.entries(responses).map(
  ([status, answer]) => {
    const { description, content = {}, headers = {} } = follow(answer);
    return [status, words(description), forms(content), Object.keys(headers).join(", ")];
  }));

function operation(id, title, operation) {
  const { summary, description, parameters: given, requestBody, responses, "x-websocket": messages } = operation;
  const parts = [make("h2", {}, title), prose(description ?? summary)];
  for (const [what, schema] of Object.entries(messages ?? {})) {
    parts.push(make("p", {}, `The client ${what.replace("_", " ")}: `, ...allowed(schema)));
  }
  if (given?.length) parts.push(parameters(given));
  for (const [media, { schema }] of Object.entries(requestBody?.content ?? {})) {
    parts.push(make("p", {}, "Body: ", ...allowed(schema), ", as ", code(media)));
  }
  return make("section", { id }, ...parts, answers(responses));
}

function show(given) {
  said = given;
  const { info, paths, components: { schemas } } = said;
  const contents = [make("h2", {}, "Routes")], sections = [];
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, said] of Object.entries(operations)) {
      const title = `${method.toUpperCase()} ${path}`, id = title.replace(/\W+/g, "-");
      contents.push(link(title, id));
      sections.push(operation(id, title, said));
    }
  }
  contents.push(make("h2", {}, "Bodies"));
  for (const [name, schema] of Object.entries(schemas)) {
    contents.push(link(name, name));
    const parts = schema.properties ? fields(schema.properties) : make("p", {}, ...allowed(schema));
    sections.push(make("section", { id: name }, make("h2", {}, name), prose(schema.description), parts));
  }
  document.getElementById("contents").replaceChildren(...contents);
  document.getElementById("reference").replaceChildren(...sections);
  document.getElementById("about").textContent = `${info.version}. ${info.description}`;
  if (location.hash) document.querySelector(`[id="${CSS.escape(location.hash.slice(1))}"]`)?.scrollIntoView();
}

/** What the server says of itself, with the key that it may need. */
async function ask() {
  const answer = await fetch("openapi.json", authorized());
  if (answer.status === 401) {
    await askForKey();
    return ask();
  }
  if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
  return answer.blob();
}

try {
  const said = await ask();
  const download = { href: URL.createObjectURL(said), download: "openapi.json" };
  if (hasKey()) Object.assign(document.getElementById("document"), download); // a link brings no key
  show(JSON.parse(await said.text()));
} catch (error) {
  document.getElementById("about").textContent = `This cannot be shown: ${error.message}`;
}
