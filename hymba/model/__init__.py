"""The model, in reading order: layers, attention, ssm, hybrid, decoder; accounting counts costs.

Nothing is imported here, so that `hymba.model.accounting` answers without torch.
"""
