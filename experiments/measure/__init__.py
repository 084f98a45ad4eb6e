"""What the experiments share: the models and data of each size, and how a whole model or its layers are measured."""
