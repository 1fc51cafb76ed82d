// A client generated from /openapi.json: it has to compile, and `node client.js URL` to run against a server.

import createClient from "openapi-fetch";
import type { components, operations, paths } from "./api.js";

type Schemas = components["schemas"];

// A type error unless T is true.
type Assert<T extends true> = T;
type IsAny<T> = 0 extends 1 & T ? true : false;
type IsVague<T> = IsAny<T> extends true ? true : unknown extends T ? true : false;
// Whether a type or a part of it is `any` or `unknown`.
type HasVague<T> = IsVague<T> extends true
  ? true
  : T extends (infer Item)[]
    ? HasVague<Item>
    : T extends object
      ? true extends { [Name in keyof T]-?: HasVague<T[Name]> }[keyof T]
        ? true
        : false
      : false;
// The bodies of all answers of an operation.
type Bodies<Operation> = Operation extends { responses: infer Responses }
  ? { [Status in keyof Responses]: Responses[Status] extends { content?: infer Content } ? Content : unknown }
  : unknown;

export type Checks = [
  Assert<HasVague<{ a: { b: unknown }[] }>>,
  Assert<HasVague<{ a: string | { b: any } }>>,
  Assert<HasVague<{ a: string | null; b?: number[] }> extends false ? true : false>,
  Assert<true extends { [Name in keyof operations]: HasVague<Bodies<operations[Name]>> }[keyof operations] ? false : true>,
  Assert<true extends { [Name in keyof Schemas]: HasVague<Schemas[Name]> }[keyof Schemas] ? false : true>,
];

// What a message says: the compiler knows every kind, and the fields of each.
function tell(message: Schemas["StreamMessage"]): string {
  switch (message.type) {
    case "queued":
      return `${message.position} before it`;
    case "started":
      return `${message.steps} steps`;
    case "progress":
      return `${message.step} of ${message.steps}, at ${message.t}`;
    case "dropped":
      return `without ${message.from} to ${message.to}`;
    case "restarting":
      return `again in ${message.retry_after_s} s`;
    case "resync":
    case "pong":
      return message.job;
    case "error":
      return message.problem.detail;
    case "succeeded":
    case "failed":
    case "cancelled":
      return message.document.status;
  }
}

async function main(baseUrl: string) {
  const api = createClient<paths>({ baseUrl });
  const models = await api.GET("/models");
  const model = models.data?.models[0];
  if (model === undefined) throw new Error(models.error?.detail);
  const asked = await api.POST("/generate", {
    body: { seed: 42, steps: 5 },
    headers: { Accept: "application/json" },
    parseAs: "json",
  });
  if (typeof asked.data !== "object" || !("images" in asked.data)) throw new Error(asked.error?.detail);
  const image = asked.data.images[0];
  if (image === undefined) throw new Error("there is no picture");
  const job = await api.GET("/jobs/{id}", { params: { path: { id: asked.data.id } } });
  const refused = await api.POST("/generate", { body: { seed: -1 } });
  const events = await api.POST("/generate", {
    body: { seed: 42, steps: 5, frames: null },
    headers: { Accept: "text/event-stream" },
    parseAs: "text",
  });
  const told: string[] = [];
  for (const event of (events.data as string).split("\n\n")) {
    const [, kind, data] = /^event: (.*)\nid: .*\ndata: (.*)$/.exec(event) ?? [];
    if (data === undefined) continue;
    if (kind === "image") told.push((JSON.parse(data) as Schemas["PictureEvent"]).image_type);
    else told.push(tell(JSON.parse(data) as Schemas["StreamMessage"]));
  }
  return {
    T: model.T,
    exact: model.runs?.exact,
    seed: job.data?.request.seed,
    sha256: image.sha256 === job.data?.images[0]?.sha256,
    refused: refused.error?.errors?.[0]?.pointer,
    told,
  };
}

declare const process: { argv: string[] };
console.log(JSON.stringify(await main(process.argv[2] ?? "")));
