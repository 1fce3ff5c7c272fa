"""What can be wrong with what an operator hands to the predictor."""


class PredictorError(ValueError):
    """An encoder, a trained predictor or a request log is not usable; the message names the file and what to do."""
