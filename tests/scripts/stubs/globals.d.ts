/** What the scripts add to the window. The browser tests wait for it. */
interface Window {
  atelierDrop?: boolean;
}
