// openai-node: every route it has.
import OpenAI, { toFile } from "openai";
import { digest, serve } from "./runner.mjs";

const TOOL = {
  type: "function",
  function: {
    name: "look_up",
    strict: true,
    parameters: {
      type: "object",
      properties: { place: { type: "string" }, depth: { type: "integer" } },
      required: ["place", "depth"],
      additionalProperties: false,
    },
  },
};
const PLACE = {
  type: "object",
  properties: { name: { type: "string" }, depth: { type: "integer" } },
  required: ["name", "depth"],
  additionalProperties: false,
};

const at = ({ url, key = "none", retries = 0, timeout = 30 }) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: retries, timeout: timeout * 1000 });
const user = (text) => [{ role: "user", content: text }];

async function all(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

const joined = (events, text) => events.map((event) => text(event) ?? "").join("");

async function chat({ model, text, stream, length, ...client }) {
  const asked = { model, messages: user(text), ...(length ? { max_tokens: length } : {}) };
  const chats = at(client).chat.completions;
  if (!stream) {
    const answer = await chats.create(asked);
    const [choice] = answer.choices;
    return {
      text: choice.message.content,
      model: answer.model,
      finish: choice.finish_reason,
      tokens: answer.usage.completion_tokens,
    };
  }
  const chunks = await all(chats.create({ ...asked, stream: true, stream_options: { include_usage: true } }));
  const choices = chunks.flatMap((chunk) => chunk.choices);
  return {
    text: joined(choices, (choice) => choice.delta.content),
    model: chunks[0].model,
    finish: choices.at(-1).finish_reason,
    tokens: chunks.at(-1).usage.completion_tokens,
  };
}

async function complete({ model, text, stream, ...client }) {
  const asked = { model, prompt: text };
  const completions = at(client).completions;
  if (!stream) return { text: (await completions.create(asked)).choices[0].text };
  const chunks = await all(completions.create({ ...asked, stream: true }));
  return { text: joined(chunks, (chunk) => chunk.choices[0]?.text) };
}

async function embed({ model, texts, ...client }) {
  const answer = await at(client).embeddings.create({ model, input: texts });
  return { vectors: answer.data.map((item) => item.embedding) };
}

async function respond({ model, text, stream, ...client }) {
  const responses = at(client).responses;
  let answer;
  if (!stream) answer = await responses.create({ model, input: text });
  else {
    const events = responses.stream({ model, input: text });
    await all(events);
    answer = await events.finalResponse();
  }
  return { text: answer.output_text, state: answer.status, id: answer.id };
}

async function keep({ model, text, length, ...client }) {
  const asked = { model, input: text, background: true, max_output_tokens: length };
  const answer = await at(client).responses.create(asked);
  return { id: answer.id, state: answer.status };
}

async function fetch({ answer, ...client }) {
  const found = await at(client).responses.retrieve(answer);
  return { id: found.id, state: found.status, text: found.output_text };
}

async function drop({ answer, ...client }) {
  const found = await at(client).responses.cancel(answer);
  return { id: found.id, state: found.status };
}

async function use_tool({ model, text, stream, ...client }) {
  const chats = at(client).chat.completions;
  const asked = { model, messages: user(text), tools: [TOOL], tool_choice: "required" };
  const completion = stream ? await chats.stream(asked).finalChatCompletion() : await chats.create(asked);
  const [call] = completion.choices[0].message.tool_calls;
  const after = await chats.create({
    model,
    tools: [TOOL],
    messages: [
      ...user(text),
      { role: "assistant", tool_calls: [{ id: call.id, type: "function", function: { ...call.function } }] },
      { role: "tool", tool_call_id: call.id, content: "high water" },
    ],
  });
  return {
    tool: call.function.name,
    arguments: JSON.parse(call.function.arguments),
    then: after.choices[0].message.content,
  };
}

async function use_tool_in_response({ model, text, stream, ...client }) {
  const responses = at(client).responses;
  const tools = [{ type: "function", ...TOOL.function }];
  const asked = { model, input: text, tools, tool_choice: "required" };
  const answer = stream ? await responses.stream(asked).finalResponse() : await responses.create(asked);
  const [item] = answer.output;
  return { tool: item.name, arguments: JSON.parse(item.arguments) };
}

async function shape({ model, text, ...client }) {
  const response_format = { type: "json_schema", json_schema: { name: "place", strict: true, schema: PLACE } };
  const answer = await at(client).chat.completions.create({ model, messages: user(text), response_format });
  return { value: JSON.parse(answer.choices[0].message.content) };
}

async function shape_response({ model, text, ...client }) {
  const format = { type: "json_schema", name: "place", strict: true, schema: PLACE };
  const answer = await at(client).responses.create({ model, input: text, text: { format } });
  return { value: JSON.parse(answer.output_text) };
}

const file = (encoded, name) => toFile(Buffer.from(encoded, "base64"), name);

async function transcribe({ model, sound, stream, ...client }) {
  const asked = { model, file: await file(sound, "a.wav") };
  const transcriptions = at(client).audio.transcriptions;
  if (!stream) return { text: (await transcriptions.create(asked)).text };
  const events = await all(transcriptions.create({ ...asked, stream: true }));
  // vLLM streams chunks like a chat's, not OpenAI's typed events.
  return { text: joined(events, (event) => event.choices[0].delta.content) };
}

async function translate({ model, sound, ...client }) {
  return { text: (await at(client).audio.translations.create({ model, file: await file(sound, "a.wav") })).text };
}

async function speak({ model, text, stream, ...client }) {
  const asked = { model, voice: "alloy", input: text, response_format: "wav" };
  const answer = await at(client).audio.speech.create(asked);
  if (!stream) return { sound: digest(Buffer.from(await answer.arrayBuffer())) };
  return { sound: digest(Buffer.concat(await all(answer.body))) };
}

async function draw({ model, text, ...client }) {
  const made = await at(client).images.generate({ model, prompt: text, size: "256x256" });
  return { picture: made.data[0].b64_json };
}

async function redraw({ model, text, image, ...client }) {
  const asked = { model, prompt: text, image: await file(image, "a.png"), size: "256x256" };
  return { picture: (await at(client).images.edit(asked)).data[0].b64_json };
}

async function models(client) {
  return { ids: (await all(at(client).models.list())).map((model) => model.id) };
}

async function model({ name, ...client }) {
  const found = await at(client).models.retrieve(name);
  return { id: found.id, object: found.object };
}

// A file, for a route that the gateway doesn't have.
async function upload({ size, ...client }) {
  const content = await toFile(Buffer.alloc(size, "x"), "a.txt");
  return { id: (await at(client).files.create({ file: content, purpose: "user_data" })).id };
}

async function read({ dialect, model, text, ...client }) {
  const one = at(client);
  const seen = [];
  try {
    const events = await {
      chat: () => one.chat.completions.create({ model, messages: user(text), stream: true }),
      complete: () => one.completions.create({ model, prompt: text, stream: true }),
      respond: () => one.responses.create({ model, input: text, stream: true }),
    }[dialect]();
    for await (const event of events) seen.push(event.type ?? event.object);
  } catch (error) {
    return { seen, raised: error.constructor.name, message: String(error.message) };
  }
  return { seen };
}

async function leave({ model, text, ...client }) {
  const asked = { model, messages: user(text), stream: true, max_tokens: 500 };
  for await (const _chunk of await at(client).chat.completions.create(asked)) break;
  return {};
}

await serve({
  ...{ chat, complete, embed, respond, keep, fetch, drop, use_tool, use_tool_in_response, shape, shape_response },
  ...{ transcribe, translate, speak, draw, redraw, models, model, upload, read, leave },
});
