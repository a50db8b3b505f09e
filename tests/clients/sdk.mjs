// What Vercel's AI SDK does: `node sdk.mjs ai-sdk-STEP URL`; fails if the answer is not the right
// one. The tool writes proof.txt.
import assert from "node:assert";
import { writeFileSync } from "node:fs";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [step, url] = process.argv.slice(2);
const options = { baseURL: `${url}/v1`, apiKey: "none" };
const chat = createOpenAICompatible({
  name: "local", supportsStructuredOutputs: true, includeUsage: true, ...options,
})("default");
const prompt = "How is the weather in Paris?";
const weather = tool({
  description: "Tells the weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => {
    writeFileSync("proof.txt", "called");
    assert.equal(city, "Paris");
    return "sunny";
  },
});
const loop = (model) => ({
  model, prompt, tools: { weather }, stopWhen: stepCountIs(3), maxRetries: 0,
});
const city = z.object({ name: z.string(), people: z.number() });
const paris = { name: "Paris", people: 2100000 };
const ends = (text) => assert.equal(text, "All done.");

const steps = {
  chat: async () => ends((await generateText(loop(chat))).text),
  "chat-stream": async () => ends(await streamText(loop(chat)).text),
  responses: async () => ends((await generateText(loop(createOpenAI(options)("default")))).text),
  anthropic: async () => ends(await streamText(loop(createAnthropic(options)("default"))).text),
  forced: async () => {
    const tools = { city: tool({ inputSchema: city }) };
    const toolChoice = { type: "tool", toolName: "city" };
    const { toolCalls } = await generateText({ model: chat, prompt, tools, toolChoice });
    assert.deepEqual(toolCalls.map((call) => call.input), [paris]);
  },
  object: async () => {
    const output = Output.object({ schema: city });
    assert.deepEqual((await generateText({ model: chat, prompt, output })).output, paris);
  },
};
await steps[step.replace("ai-sdk-", "")]();
