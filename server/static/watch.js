// Watching one job, through lost connections, a replaced engine and a restarted server.
//
// Pictures are a pure function of the request. So when a server no longer knows the job, the same request is made
// again, and what has been shown is right already.

import { Refused, submit, wait } from "./api.js";
import { protocols } from "./key.js";

const MOST_REMAKES = 3; // a job that takes the server down with it must not do so for ever
const PATIENCE_S = 10; // a connection that is silent for so long is asked for a sign of life, and then given up
const ENGINE_FAILED = 1011, RESTARTING = 1012, TRY_LATER = 1013, BAD_REQUEST = 4400, POLICY = 1008, UNKNOWN_JOB = 4404;
const WHY_LOST = { [RESTARTING]: "The server is restarting", [TRY_LATER]: "The connection was too slow" };

export class Watch {
  /** `listener` has say(text), progress(message), picture(header, bytes), replaced(job), ended(status, text, job). */
  constructor(job, listener) {
    Object.assign(this, { job, listener, seq: 0, delay_s: 0.5, remakes: 0, silent: false, heard: false, over: false });
    this.note = ""; // what has gone wrong and is being put right
    this.story = ""; // and is told once it has been
    this.heart = setInterval(() => this.beat(), PATIENCE_S * 1000);
    this.open();
  }

  open() {
    const url = new URL(`jobs/${this.job.id}/stream?after=${this.seq}`, location.href);
    const socket = (this.socket = new WebSocket(url.href.replace(/^http/, "ws"), protocols()));
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.silent = false;
      this.heard = true;
      this.delay_s = 0.5;
      if (typeof data === "string") this.hear(JSON.parse(data));
      else this.see(data);
    };
    socket.onclose = ({ code, reason }) => socket === this.socket && this.lost(code, reason);
  }

  /** Nothing more is heard. */
  stop() {
    this.over = true;
    clearInterval(this.heart);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  beat() {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    if (this.silent) return this.lost(0, ""); // a connection that died without a word is never closed by itself
    this.silent = true;
    this.socket.send('{"type": "ping"}');
  }

  hear(message) {
    const seen = this.seq > 0;
    this.seq = message.seq ?? this.seq;
    const { type, document: job } = message;
    if (type === "queued") {
      const others = message.position === 1 ? "1 job" : `${message.position} jobs`;
      this.listener.say(this.note || (message.position ? `Waiting behind ${others}` : "Waiting for a slot"));
    } else if (type === "progress") {
      this.listener.say(this.note || "Building");
      this.listener.progress(message);
    } else if (type === "restarting") {
      this.note = "The engine failed and is being replaced; the same picture is being made again";
      this.story = ", although the engine was replaced on the way";
      this.listener.say(this.note);
    } else if (type === "resync" && seen) {
      this.note = "The server was restarted; the same picture is being made again";
      this.story = ", although the server was restarted on the way";
      this.listener.say(this.note);
    } else if (type === "succeeded") {
      const seconds = (job.finished_at - job.created_at).toFixed(1);
      this.end(type, `Built in ${seconds} s${this.story}`, job);
    } else if (type === "cancelled") this.end(type, "Cancelled", job);
    else if (type === "failed") this.end(type, `Failed: ${job.error?.detail ?? "for an unknown reason"}`, job);
  }

  see(data) {
    const length = new DataView(data).getUint32(4);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, length)));
    this.seq = header.seq;
    this.listener.picture(header, new Uint8Array(data, 8 + length));
  }

  end(status, text, job = this.job) {
    if (this.over) return; // another job has the stage by now
    this.stop();
    this.listener.ended(status, text, job);
  }

  async lost(code, reason) {
    this.socket?.close();
    this.socket = null;
    if (code === UNKNOWN_JOB) return this.makeAgain();
    if (code === ENGINE_FAILED) return this.end("failed", "Failed: the engine is down until the server starts anew");
    if (code === BAD_REQUEST || code === POLICY) {
      return this.end("failed", `Failed: ${reason || "the server ended the connection"}`);
    }
    this.listener.say(`${WHY_LOST[code] ?? "The connection was lost"}; trying again`);
    this.silent = false;
    await wait(this.delay_s);
    this.delay_s = Math.min(5, 2 * this.delay_s);
    if (!this.over) this.open();
  }

  async makeAgain() {
    if (++this.remakes > MOST_REMAKES) {
      return this.end("failed", `Failed: the server lost this job ${this.remakes} times. Build makes it once more`);
    }
    const why = this.heard ? "The server was restarted" : "The server no longer has this job";
    this.note = `${why}; the same picture is being made again`;
    this.story = this.heard ? ", although the server was restarted on the way" : "";
    this.listener.say(this.note);
    try {
      const job = await submit(this.job.request, (text) => this.over || this.listener.say(text), () => this.over, true);
      if (!job) return;
      this.job = job;
      this.seq = 0;
      this.listener.replaced(job);
      this.open();
    } catch (refusal) {
      if (!(refusal instanceof Refused)) throw refusal;
      this.end("failed", `Failed: ${refusal.message}`);
    }
  }
}
