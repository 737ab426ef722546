"""The web page: reads run folders, writes config files, starts processes. It holds no tensor and imports no torch."""
