"""All that must agree with the released MiniCPM-V models to the bit."""
