"""From results files to Markdown, plots and pages; the same file gives the same text."""
