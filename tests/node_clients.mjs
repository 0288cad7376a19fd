// The official Node SDKs against a router: prints what they understood as one JSON object.
//
//   HERMES_TEST_CLIS=<folder with node_modules> ROUTER_URL=http://127.0.0.1:NNNN ROUTER_KEY=... \
//     node node_clients.mjs <model>

import { createRequire } from "node:module";
import { resolve } from "node:path";

const load = createRequire(resolve(process.env.HERMES_TEST_CLIS, "package.json"));
const pick = (name) => load(name).default ?? load(name);
const OpenAI = pick("openai");
const Anthropic = pick("@anthropic-ai/sdk");

const model = process.argv[2];
const url = process.env.ROUTER_URL;
const key = process.env.ROUTER_KEY;
const bounds = { maxRetries: 0, timeout: 20_000 };
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, ...bounds });
const anthropic = new Anthropic({ baseURL: url, apiKey: key, ...bounds });

const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const claudeTools = [{ name: "get_weather", input_schema: schema }];
const flatFunctions = [{ type: "function", name: "get_weather", parameters: schema, strict: false }];
const functions = [
  { type: "function", function: { name: "get_weather", parameters: schema } },
];
const hello = (text) => [{ role: "user", content: text }];

// --- Messages ---

const claude = (text, more = {}) => ({ model, max_tokens: 1000, messages: hello(text), ...more });

function readMessage(message) {
  const of = (type) => message.content.filter((block) => block.type === type);
  return {
    text: of("text").map((block) => block.text).join(""),
    calls: of("tool_use").map((block) => [block.name, block.input]),
    stop: message.stop_reason,
    output: message.usage.output_tokens,
  };
}

async function messagesWhole() {
  return readMessage(await anthropic.messages.create(claude("hello")));
}

async function messagesStream() {
  let heard = "";
  const stream = anthropic.messages.stream(claude("hello")).on("text", (text) => (heard += text));
  const message = readMessage(await stream.finalMessage());
  return { ...message, heard };
}

async function messagesTools() {
  const options = claude("use tools", { tools: claudeTools });
  const first = await anthropic.messages.stream(options).finalMessage();
  const results = first.content
    .filter((block) => block.type === "tool_use")
    .map((block) => ({ type: "tool_result", tool_use_id: block.id, content: "21 °C" }));
  const messages = [
    ...options.messages,
    { role: "assistant", content: first.content },
    { role: "user", content: results },
  ];
  const second = await anthropic.messages.create({ ...options, messages });
  return { ...readMessage(first), then: readMessage(second).text };
}

async function messagesCount() {
  return (await anthropic.messages.countTokens({ model, messages: hello("hello") })).input_tokens > 0;
}

async function messagesError() {
  try {
    await anthropic.messages.create(claude("hello", { messages: [] }));
  } catch (error) {
    return [error.constructor.name, error.status, error.error?.error?.type];
  }
}

// --- Responses ---

function readResponse(response) {
  return {
    text: response.output_text,
    calls: response.output
      .filter((item) => item.type === "function_call")
      .map((item) => [item.name, JSON.parse(item.arguments)]),
    status: response.status,
    output: response.usage.output_tokens,
  };
}

async function responsesWhole() {
  return readResponse(await openai.responses.create({ model, input: "hello" }));
}

async function responsesStream() {
  let heard = "";
  const stream = openai.responses
    .stream({ model, input: "hello" })
    .on("response.output_text.delta", (event) => (heard += event.delta));
  const response = readResponse(await stream.finalResponse());
  return { ...response, heard };
}

async function responsesTools() {
  const options = { model, tools: flatFunctions };
  const stream = openai.responses.stream({ ...options, input: "use tools" });
  const first = await stream.finalResponse();
  const results = first.output
    .filter((item) => item.type === "function_call")
    .map((item) => ({ type: "function_call_output", call_id: item.call_id, output: "21 °C" }));
  const again = [...hello("use tools"), ...first.output, ...results];
  const second = await openai.responses.create({ ...options, input: again });
  return { ...readResponse(first), then: second.output_text };
}

async function responsesError() {
  try {
    await openai.responses.create({ model, input: 3 });
  } catch (error) {
    return [error.constructor.name, error.status, error.type];
  }
}

// --- Chat ---

async function chatStream() {
  const options = { model, messages: hello("hello") };
  return await openai.chat.completions.stream(options).finalContent();
}

async function chatTools() {
  const options = { model, messages: hello("use tools"), tools: functions };
  const done = await openai.chat.completions.stream(options).finalChatCompletion();
  return done.choices[0].message.tool_calls.map((call) => [
    call.function.name,
    JSON.parse(call.function.arguments),
  ]);
}

async function models() {
  const [chat, claudes] = [await openai.models.list(), await anthropic.models.list()];
  return [chat, claudes].every((page) => page.data.some((one) => one.id === "hermes-router"));
}

const checks = {
  messagesWhole,
  messagesStream,
  messagesTools,
  messagesCount,
  messagesError,
  responsesWhole,
  responsesStream,
  responsesTools,
  responsesError,
  chatStream,
  chatTools,
  models,
};
const heard = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    heard[name] = await check();
  } catch (error) {
    heard[name] = `${error.constructor.name}: ${error.message}`;
  }
}
console.log(JSON.stringify(heard));
