"""From a float model and calibration data to a model in the number formats that each device needs."""
