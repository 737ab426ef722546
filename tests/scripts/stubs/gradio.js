// Stands in for the module that the server generates from app/gradio_compat.py.
// test_scripts.py checks that both contain the same.

export const SELECTORS = {
  tab: "#tabs [role=tab]",
  selectedTab: "#tabs [role=tab][aria-selected=true]",
  listInput: "input[role=combobox]",
  accordionButton: ":scope > button",
  openAccordion: ".open",
  pageConfig: "gradio_config",
  viewCallRoute: "/gradio_api/component_server",
};
