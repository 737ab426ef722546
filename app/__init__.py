"""The web page: reads run folders, writes settings, starts processes. Holds no tensor and imports no torch."""
