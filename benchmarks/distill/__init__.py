"""What distillation objectives are worth, from several teachers at once, measured on whole trainings."""
