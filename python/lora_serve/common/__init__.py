"""What every part may use: errors, sampling parameters, configuration, outputs."""
