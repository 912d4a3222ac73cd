// The AI SDK, with one of its providers: `node ai.mjs openai` or `node ai.mjs compatible`.
import {
  Output,
  embedMany,
  generateImage,
  generateSpeech,
  generateText,
  isStepCount,
  streamText,
  tool,
  transcribe as hear,
} from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
import { digest, serve } from "./runner.mjs";

const [, , provider] = process.argv;
const PLACE = z.object({ name: z.string(), depth: z.number().int() });

function at({ url, key = "none" }) {
  const baseURL = `${url}/v1`;
  if (provider === "openai") return createOpenAI({ baseURL, apiKey: key });
  const options = { name: "tidegate", baseURL, apiKey: key };
  return createOpenAICompatible({ ...options, includeUsage: true, supportsStructuredOutputs: true });
}

const chatModel = (client, model) =>
  provider === "openai" ? at(client).chat(model) : at(client).chatModel(model);
const completionModel = (client, model) =>
  provider === "openai" ? at(client).completion(model) : at(client).completionModel(model);

const limits = ({ retries = 0, timeout = 30 }) => ({
  maxRetries: retries,
  abortSignal: AbortSignal.timeout(timeout * 1000),
});

// Text of a model, whole or streamed; a stream's error is thrown, as nothing else would show it.
async function say(asked, stream) {
  if (!stream) return generateText(asked);
  let failed;
  const result = streamText({ ...asked, onError: ({ error }) => (failed = error) });
  await result.consumeStream();
  if (failed) throw failed;
  const [text, finishReason, usage, response] = await Promise.all([
    result.text,
    result.finishReason,
    result.usage,
    result.response,
  ]);
  return { text, finishReason, usage, response, toolCalls: await result.toolCalls, steps: await result.steps };
}

async function chat({ model, text, stream, length, ...client }) {
  const asked = { model: chatModel(client, model), prompt: text, maxOutputTokens: length, ...limits(client) };
  const answer = await say(asked, stream);
  return {
    text: answer.text,
    model: answer.response.modelId,
    finish: answer.finishReason,
    tokens: answer.usage.outputTokens,
  };
}

async function complete({ model, text, stream, ...client }) {
  const asked = { model: completionModel(client, model), prompt: text, ...limits(client) };
  return { text: (await say(asked, stream)).text };
}

async function embed({ model, texts, ...client }) {
  const { embeddings } = await embedMany({ model: at(client).embeddingModel(model), values: texts, maxRetries: 0 });
  return { vectors: embeddings };
}

async function respond({ model, text, stream, ...client }) {
  const answer = await say({ model: at(client).responses(model), prompt: text, ...limits(client) }, stream);
  return { text: answer.text, state: answer.finishReason === "stop" ? "completed" : answer.finishReason };
}

const lookUp = tool({
  description: "Says how the tide is at a place.",
  inputSchema: z.object({ place: z.string(), depth: z.number().int() }),
  execute: async ({ place }) => `high water at ${place}`,
});

// The text names the tool, so it is called; then its result is answered: two steps.
async function called(model, text, stream, client) {
  const asked = { model, prompt: text, tools: { look_up: lookUp }, stopWhen: isStepCount(3), ...limits(client) };
  const { steps } = await say(asked, stream);
  const [call] = steps[0].toolCalls;
  return { tool: call.toolName, arguments: call.input, then: steps[1].text };
}

const use_tool = ({ model, text, stream, ...client }) => called(chatModel(client, model), text, stream, client);
const use_tool_in_response = ({ model, text, stream, ...client }) =>
  called(at(client).responses(model), text, stream, client);

async function shaped(model, text, client) {
  const answer = await generateText({
    model,
    prompt: text,
    output: Output.object({ schema: PLACE }),
    ...limits(client),
  });
  return { value: answer.output };
}

const shape = ({ model, text, ...client }) => shaped(chatModel(client, model), text, client);
const shape_response = ({ model, text, ...client }) => shaped(at(client).responses(model), text, client);

async function transcribe({ model, sound, ...client }) {
  const audio = Buffer.from(sound, "base64");
  return { text: (await hear({ model: at(client).transcription(model), audio, ...limits(client) })).text };
}

async function speak({ model, text, ...client }) {
  const asked = { model: at(client).speech(model), text, outputFormat: "wav", ...limits(client) };
  return { sound: digest((await generateSpeech(asked)).audio.uint8Array) };
}

async function draw({ model, text, ...client }) {
  const asked = { model: at(client).imageModel(model), prompt: text, size: "256x256", ...limits(client) };
  return { picture: (await generateImage(asked)).image.base64 };
}

async function redraw({ model, text, image, ...client }) {
  const prompt = { text, images: [Buffer.from(image, "base64")] };
  const asked = { model: at(client).imageModel(model), prompt, size: "256x256", ...limits(client) };
  return { picture: (await generateImage(asked)).image.base64 };
}

async function read({ dialect, model, text, ...client }) {
  const chosen = {
    chat: () => chatModel(client, model),
    complete: () => completionModel(client, model),
    respond: () => at(client).responses(model),
  }[dialect]();
  const seen = [];
  let failed;
  const result = streamText({
    model: chosen,
    prompt: text,
    onError: ({ error }) => (failed = error),
    ...limits(client),
  });
  for await (const part of result.stream ?? result.fullStream) seen.push(part.type);
  if (failed === undefined) return { seen };
  return { seen, raised: failed?.constructor?.name ?? "error", message: JSON.stringify(failed?.message ?? failed) };
}

async function leave({ model, text, ...client }) {
  const gone = new AbortController();
  const asked = { model: chatModel(client, model), prompt: text, maxOutputTokens: 500, maxRetries: 0 };
  const result = streamText({ ...asked, abortSignal: gone.signal, onError: () => {} });
  for await (const _piece of result.textStream) break;
  gone.abort();
  return {};
}

const shared = { chat, complete, embed, use_tool, shape, draw, redraw, read, leave };
const own = { respond, use_tool_in_response, shape_response, transcribe, speak };
await serve(provider === "openai" ? { ...shared, ...own } : shared);
