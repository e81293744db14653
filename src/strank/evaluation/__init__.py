"""How well a model orders the spots of sections that it has not seen, beside two baselines."""
