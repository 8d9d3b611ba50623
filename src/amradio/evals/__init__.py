"""Evaluations of frozen backbones: one module a protocol, each returning an `amradio.evals.report.EvalReport`."""
