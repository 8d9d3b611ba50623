"""Multi-teacher distillation: several frozen teachers into one student, at any resolution."""
