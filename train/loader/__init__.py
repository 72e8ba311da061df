"""train/loader"""
