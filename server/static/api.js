// Asking the server, by the same public API as everybody. A refusal is an error that says in words what is wrong.

import { authorized } from "./key.js";

const MOST_FRAMES = 4096; // pictures x points x kinds, as the server has it unless it was told otherwise
const PLANNED = ["sampler", "steps", "order", "timesteps", "spacing", "eta", "variance", "clip"];

export class Refused extends Error {
  constructor(status, problem, retryAfter_s) {
    super(problem.detail ?? (status ? `The server answered ${status}.` : "The server does not answer."));
    this.status = status; // 0: nobody answered
    this.errors = problem.errors ?? [];
    this.retryAfter_s = retryAfter_s;
  }
}

export const wait = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

export async function ask(path, options) {
  const answer = await fetch(path, authorized(options)).catch(() => { throw new Refused(0, {}, 0); });
  if (answer.ok) return answer;
  throw new Refused(answer.status, await answer.json().catch(() => ({})), +answer.headers.get("retry-after") || 0);
}

/** A request, or that of a job, without what a plan or given levels stand for, which may not be beside them. */
export function decisions(request) {
  const others = request.plan ? PLANNED : request.timesteps ? ["steps", "spacing"] : [];
  return Object.fromEntries(Object.entries(request).filter(([name, value]) => value !== null && !others.includes(name)));
}

/** The job that a request becomes. Where the server allows fewer frames, it is asked for fewer. */
async function submitOnce(request) {
  const headers = { "content-type": "application/json", prefer: "respond-async" };
  let count = request.frames?.count ?? Math.min(30, Math.floor(MOST_FRAMES / 2 / request.n));
  for (;;) {
    const frames = { count: Math.max(2, count), kind: "both" };
    try {
      const body = JSON.stringify({ ...decisions(request), frames });
      return await (await ask("generate", { method: "POST", headers, body })).json();
    } catch (refusal) {
      const tooMany = refusal.status === 422 && refusal.errors.every(({ pointer }) => pointer.startsWith("/frames"));
      if (!tooMany || refusal.errors.length === 0 || count <= 2) throw refusal;
      count = Math.floor(count / 2);
    }
  }
}

/** The job; or null if it was given up. A server that is starting is waited for, and `say` hears so. With
    `outlastsSilence` a server that does not answer at all is waited for too. */
export async function submit(request, say, isGivenUp, outlastsSilence = false) {
  for (let delay_s = 0.5; !isGivenUp(); delay_s = Math.min(5, 2 * delay_s)) {
    try {
      const job = await submitOnce(request);
      if (!isGivenUp()) return job;
      await ask(`jobs/${job.id}`, { method: "DELETE" });
    } catch (refusal) {
      const starting = refusal.status === 503 && refusal.retryAfter_s > 0;
      if (!starting && !(refusal.status === 0 && outlastsSilence)) throw refusal;
      const pause_s = starting ? refusal.retryAfter_s : delay_s;
      say(`Not ready yet: ${sentence(refusal.message)} Trying again in ${pause_s} s.`);
      await wait(pause_s);
    }
  }
  return null;
}

export const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
