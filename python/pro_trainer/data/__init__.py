"""Records: read, recognised, cleaned, chosen, reported on."""
