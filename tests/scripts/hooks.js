// Resolves "gradio.js", which the server generates, to the stub. See `page.js`.

const STUB = new URL("./stubs/gradio.js", import.meta.url).href;

/** @type {import("node:module").ResolveHook} */
export async function resolve(specifier, context, next) {
  if (/^(\.\.?\/)+gradio\.js$/.test(specifier)) return { url: STUB, shortCircuit: true };
  return next(specifier, context);
}
