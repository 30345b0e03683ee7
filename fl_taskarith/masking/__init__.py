"""Which weights are updated: sensitivity, calibration, rules, and the mask itself. Pure tensor code, no Flower."""
