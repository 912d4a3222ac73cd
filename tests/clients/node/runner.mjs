// What every Node client's program has in common: orders come in, line by line, and facts go out.
import { createHash } from "node:crypto";
import { createInterface } from "node:readline";

// Answers {"number": n, "do": route, "with": {...}} with the facts of that route, until no more come. What a client
// throws is a fact too; the route "routes" tells which there are.
export async function serve(routes) {
  for (const name of ["log", "info", "warn"]) console[name] = console.error;
  for await (const line of createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    const begin = performance.now();
    let found;
    try {
      if (order.do === "routes") found = { routes: Object.keys(routes) };
      else found = await routes[order.do](order.with);
    } catch (error) {
      found = raised(error);
    }
    const seconds = (performance.now() - begin) / 1000;
    process.stdout.write(JSON.stringify({ ...found, number: order.number, seconds }) + "\n");
  }
  process.exit(0);
}

// What a caller can tell of an error.
export function raised(error) {
  const kinds = [];
  for (let kind = Object.getPrototypeOf(error); kind; kind = Object.getPrototypeOf(kind)) {
    kinds.push(kind.constructor.name);
  }
  const status = error.status ?? error.statusCode ?? error.lastError?.statusCode ?? null;
  return {
    raised: error.name === "Error" ? kinds[0] : error.name,
    kinds,
    status,
    code: error.code ?? error.data?.error?.code ?? null,
    request_id: error.requestID ?? error.responseHeaders?.["x-request-id"] ?? null,
    message: String(error.message ?? error).slice(0, 1000),
  };
}

// A long answer in short.
export function digest(data) {
  return createHash("sha256").update(data).digest("hex");
}
