"""Questions with known answers that a model is asked by named protocols: HellaSwag, LAMBADA and others."""
