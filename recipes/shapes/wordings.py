"""The wordings and words that the last stage trains on: questions, requests, small talk, and what the world does not have.

Evaluation has others (`scale_rae/shapes/asking.py`): no wording and no noun is in both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from scale_rae.prompt import SYSTEM
from scale_rae.shapes import asking, world

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "match": (
        "Would you say that this {image} agrees with the prompt: {prompt}?",
        "Is the {image} in line with the prompt: {prompt}?",
        "Does what you see fit the text: {prompt}?",
        'Is "{prompt}" a true account of this {image}?',
        "Do the {image} and the prompt agree: {prompt}?",
        "Does this image align with the prompt: {prompt}?",
        "Does this {image} align with the prompt: {prompt}?",
        "Does the {image} match the prompt: {prompt}?",
        "Does this {image} match: {prompt}?",
        "Does the {image} show {prompt}?",
        "Is this {prompt}?",
        "Is it {prompt}?",
        "Is this {image} {prompt}?",
        "Does this {image} fit the prompt: {prompt}?",
        "Does the prompt fit the {image}: {prompt}?",
        "Does the description fit: {prompt}?",
        "Is the description true: {prompt}?",
        'Is "{prompt}" right?',
        "Is it correct to call this {prompt}?",
        'Does "{prompt}" describe this {image}?',
        "Does the text describe the {image}: {prompt}?",
        "Is the {image} as asked for: {prompt}?",
        "Is this what was asked for: {prompt}?",
        "Prompt: {prompt}. Does the {image} follow it?",
        "Has the {image} been drawn as the prompt says: {prompt}?",
        "Here is a prompt: {prompt}. Do they match?",
        "Is this {image} a good match for {prompt}?",
        "Does this {image} correspond to the prompt: {prompt}?",
        "Does it agree with: {prompt}?",
        "Do you agree that this is {prompt}?",
        "Can this be called {prompt}?",
        "Please check whether this is {prompt}.",
        "True or false: this is {prompt}.",
        "{prompt}: is that right?",
        "Is this {image} consistent with {prompt}?",
    ),
    "there": (
        "Can {thing} be found in this {image}?",
        "Is {thing} among the {object}s?",
        "Tell me whether there is {thing}.",
        "Could you spot {thing} in here?",
        "Did you notice {thing} in the {image}?",
        "I wonder if there is {thing} here.",
        "Is there {thing}?",
        "Is there {thing} in this {image}?",
        "Is there {thing} in the {image}?",
        "Is there {thing} here?",
        "Is {thing} there?",
        "Is {thing} in the {image}?",
        "Is {thing} in it?",
        "Can you see {thing}?",
        "Can you see {thing} in this {image}?",
        "Can you find {thing}?",
        "Do you see {thing}?",
        "Do you see {thing} in the {image}?",
        "Do you find {thing} in this {image}?",
        "Does this {image} contain {thing}?",
        "Does it contain {thing}?",
        "Does the {image} have {thing}?",
        "Does the {image} have {thing} in it?",
        "Does the {image} include {thing}?",
        "Has the {image} got {thing}?",
        "Are you able to see {thing}?",
        "I see {thing}. Is that right?",
        "Is one of the {object}s {thing}?",
        "Is one of them {thing}?",
        "Does {thing} appear in the {image}?",
        "Does {thing} exist here?",
        "Please tell me if there is {thing}.",
        "Say yes if you see {thing}.",
        "Would I find {thing} here?",
        "Is {thing} shown?",
        "Is {thing} visible?",
        "There is {thing}, is there not?",
        "Check for {thing}.",
        "Any sign of {thing}?",
    ),
    "any": (
        "Have you found any {things} in this {image}?",
        "Tell me whether the {image} has {things} in it.",
        "Are any of the {object}s {things}?",
        "Could you spot any {things} here?",
        "Are there any {things}?",
        "Are there any {things} in this {image}?",
        "Are there {things} in the {image}?",
        "Do you see any {things}?",
        "Do you see {things} here?",
        "Can you see any {things}?",
        "Can you find any {things} in it?",
        "Does the {image} have any {things}?",
        "Does this {image} contain {things}?",
        "Does it show any {things}?",
        "Are any {things} there?",
        "Are {things} visible?",
        "Please tell me if there are any {things}.",
        "Is there any sign of {things}?",
        "Has it got any {things}?",
        "Any {things}?",
        "Any {things} here?",
    ),
    "number": (
        "Would you say there are {number} {things} here?",
        "Is {number} the number of {things} in this {image}?",
        "Tell me if this {image} has exactly {number} {things}.",
        "Are there {number} {things}?",
        "Are there {number} {things} in this {image}?",
        "Are there exactly {number} {things}?",
        "Do you see {number} {things}?",
        "Can you see {number} {things} here?",
        "Does the {image} show {number} {things}?",
        "Does it contain {number} {things}?",
        "Does this {image} have {number} {things}?",
        "Is the number of {things} {number}?",
        "Do you count {number} {things}?",
        "Please check that there are {number} {things}.",
        "There are {number} {things}, right?",
        "Is it true that there are {number} {things}?",
    ),
    "it_color": (
        "Would you call it {color}?",
        "Is this {object} painted {color}?",
        "Is {color} its {hue}?",
        "Tell me, is the {object} here {color}?",
        "Is it {color}?",
        "Is this {color}?",
        "Is the {object} {color}?",
        "Is this {object} {color}?",
        "Is the {object} in the {image} {color}?",
        "Is the {object} in {color}?",
        "Is its {hue} {color}?",
        "Is the {hue} {color}?",
        "Does it look {color}?",
        "Does the {object} have the {hue} {color}?",
        "Do you see a {color} {object}?",
        "Is there a {color} {object}?",
        "Is there something {color}?",
        "Is that {color}?",
        "It is {color}, right?",
        "So it is {color}?",
        "Can it be said to be {color}?",
        "Please tell me if it is {color}.",
        "Is what you see {color}?",
        "{color}?",
    ),
    "it_shape": (
        "Would you call it {thing}?",
        "Is what you see here {thing}?",
        "Tell me, is this {object} {thing}?",
        "Might this be {thing}?",
        "Is it {thing}?",
        "Is this {thing}?",
        "Is that {thing}?",
        "Is the {object} {thing}?",
        "Is this {object} {thing}?",
        "Is its shape that of {thing}?",
        "Is the {object} in the {image} {thing}?",
        "Is it shaped like {thing}?",
        "Does it look like {thing}?",
        "Does the {object} look like {thing}?",
        "Is {thing} what you see?",
        "Does it have the shape of {thing}?",
        "This is {thing}, right?",
        "So it is {thing}?",
        "Could it be {thing}?",
        "Please tell me if it is {thing}.",
        "Can it be called {thing}?",
    ),
    "color_is": (
        "Would you call the {shape} {color}?",
        "Is {color} the {hue} of the {shape}?",
        "Tell me whether the {shape} is {color}.",
        "Is the {shape} here painted {color}?",
        "Is the {shape} {color}?",
        "Is the {shape} in the {image} {color}?",
        "Is this {shape} {color}?",
        "Is the {hue} of the {shape} {color}?",
        "Does the {shape} look {color}?",
        "Does the {shape} have the {hue} {color}?",
        "Is the {shape} drawn in {color}?",
        "The {shape} is {color}, right?",
        "Is it true that the {shape} is {color}?",
        "Please tell me if the {shape} is {color}.",
        "Do you see that the {shape} is {color}?",
        "Can the {shape} be called {color}?",
        "Has the {shape} the {hue} {color}?",
        "Does the {shape}'s {hue} look {color}?",
        "Can the {shape}'s {hue} be called {color}?",
        "Would you call the {shape}'s {hue} {color}?",
        "Was the {shape}'s {hue} meant to be {color}?",
        "The {shape}'s {hue} is {color}, right?",
    ),
    "describe": (
        "Could you tell me what this {image} has in it?",
        "Give me an account of this {image}.",
        "What would you say is in the {image}?",
        "I want to know what is in this {image}.",
        "Name everything that you see here.",
        "Put this {image} into words, please.",
        "What has been drawn here?",
        "Describe this image.",
        "Describe this {image}.",
        "Describe the {image}.",
        "Describe it.",
        "Describe what you see.",
        "Please describe this {image}.",
        "Please describe what you see in the {image}.",
        "Can you describe this {image}?",
        "Can you describe the {image}?",
        "Can you describe what you see?",
        "Can you describe what's in this {image}?",
        "Can you describe what is in the {image}?",
        "Can you tell me what is in this {image}?",
        "Can you say what the {image} shows?",
        "Could you describe this {image}?",
        "What's in this {image}?",
        "What is in this {image}?",
        "What is in the {image}?",
        "What's in the {image}?",
        "What's in it?",
        "What is this {image} of?",
        "What do you see?",
        "What do you see in this {image}?",
        "What do you see here?",
        "What can you see?",
        "What can you see in the {image}?",
        "What does this {image} show?",
        "What does the {image} show?",
        "What does it show?",
        "What does this {image} contain?",
        "What does the {image} depict?",
        "What is shown?",
        "What is shown in the {image}?",
        "What is shown here?",
        "What is there?",
        "What is there in the {image}?",
        "What is drawn here?",
        "What are you looking at?",
        "What is going on in this {image}?",
        "What have you drawn?",
        "What did you draw?",
        "Tell me what you see.",
        "Tell me what is in the {image}.",
        "Tell me about this {image}.",
        "Say what is in the {image}.",
        "Write a caption for this {image}.",
        "Give me a caption.",
        "Give a description of this {image}.",
        "Give me a description.",
        "List the objects.",
        "List everything in the {image}.",
        "List what is in it.",
        "Which objects are in the {image}?",
        "Which objects are there?",
        "Which things do you see?",
        "What things are in this {image}?",
        "What objects do you see?",
        "I would know what is in the {image}.",
        "Explain this {image}.",
        "Read this {image}.",
        "Caption this {image}.",
        "In a sentence, what is in the {image}?",
        "How is this {image} best described?",
        "Identify everything in the {image}.",
    ),
    "which_shape": (
        "What kind of {object} do you see here?",
        "Tell me which shape this is.",
        "What is the name of this shape?",
        "Which shape did you find?",
        "What shape is this?",
        "What shape is it?",
        "What shape is that?",
        "What shape is the {object}?",
        "What shape is shown?",
        "What shape is in the {image}?",
        "What shape do you see?",
        "What shape do you see in this {image}?",
        "What shape does it have?",
        "What shape does the {object} have?",
        "What is the shape?",
        "What is its shape?",
        "What's the shape?",
        "What's its shape?",
        "What is the shape of it?",
        "What is the shape of the {object}?",
        "Which shape is this?",
        "Which shape is it?",
        "Which shape is in the {image}?",
        "Which shape do you see?",
        "Which shape is shown here?",
        "What kind of shape is this?",
        "What kind of shape is it?",
        "What sort of shape is this?",
        "Name the shape.",
        "Name this shape.",
        "Tell me the shape.",
        "Tell me what shape it is.",
        "Can you tell me the shape?",
        "Can you name the shape?",
        "Please name the shape.",
        "Say which shape this is.",
        "How is it shaped?",
        "What form does it have?",
        "The shape is what?",
    ),
    "which_shapes": (
        "Tell me which shapes you see.",
        "What are the shapes in here?",
        "Which shapes did you find in this {image}?",
        "What shapes are there?",
        "What shapes are these?",
        "What shapes are in this {image}?",
        "What shapes do you see?",
        "What shapes does the {image} show?",
        "Which shapes are there?",
        "Which shapes are in the {image}?",
        "Which shapes do you see?",
        "Which shapes can you see here?",
        "Which shapes are shown?",
        "Name the shapes.",
        "List the shapes.",
        "Please name the shapes in the {image}.",
        "Can you name the shapes?",
        "What shape is this?",
        "What shape are they?",
        "Tell me the shapes.",
    ),
    "shape_of": (
        "Tell me the shape of the {color} one.",
        "What is the {color} {object} shaped like?",
        "Which shape has the {hue} {color}?",
        "What shape is the {color} {object}?",
        "What shape is the {color} one?",
        "What shape does the {color} {object} have?",
        "Which shape is {color}?",
        "Which {object} is {color}?",
        "What is {color}?",
        "What is the {color} {object}?",
        "What's the {color} {object}?",
        "What is the shape of the {color} {object}?",
        "What is the shape of the {color} one?",
        "Name the {color} shape.",
        "Name the {color} {object}.",
        "Which one is {color}?",
        "Can you name the {color} {object}?",
        "What do you see in {color}?",
        "How is the {color} {object} shaped?",
        "Which shape has been drawn in {color}?",
        "The {color} {object} is what shape?",
        "Which shape does the {color} {object} have?",
        "Which shape do you call the {color} {object}?",
        "Of what shape is the {color} {object}?",
        "What do you call the {color} {object}?",
        "Say what the {color} {object} is.",
        "Which {object} of the {image} is {color}?",
    ),
    "which_color": (
        "Tell me its {hue}.",
        "What would you say its {hue} is?",
        "In which {hue} is this {object} painted?",
        "What {hue} is it?",
        "What {hue} is this?",
        "What {hue} is that?",
        "What {hue} is the {object}?",
        "What {hue} is this {object}?",
        "What {hue} does it have?",
        "What {hue} do you see?",
        "What is the {hue}?",
        "What is its {hue}?",
        "What's its {hue}?",
        "What's the {hue}?",
        "What is the {hue} of it?",
        "What is the {hue} of the {object}?",
        "Which {hue} is it?",
        "Which {hue} is this?",
        "Which {hue} does the {object} have?",
        "Which {hue} do you see?",
        "Name the {hue}.",
        "Name its {hue}.",
        "Tell me the {hue}.",
        "Tell me what {hue} it is.",
        "Can you tell me the {hue}?",
        "Can you name its {hue}?",
        "Please say which {hue} it has.",
        "In what {hue} is it?",
        "In which {hue} is it drawn?",
        "The {hue} is what?",
    ),
    "which_colors": (
        "Tell me the {hue}s in this {image}.",
        "What are the {hue}s of the {object}s here?",
        "Which {hue}s did you find?",
        "What {hue}s are there?",
        "What {hue}s do you see?",
        "What {hue}s are in this {image}?",
        "What {hue}s are the {object}s?",
        "What {hue}s are they?",
        "What {hue} are they?",
        "What {hue} is it?",
        "Which {hue}s are there?",
        "Which {hue}s are in the {image}?",
        "Which {hue}s do you see?",
        "Which {hue}s does the {image} have?",
        "Name the {hue}s.",
        "List the {hue}s.",
        "Can you name the {hue}s?",
        "Please list the {hue}s of the {object}s.",
        "Say which {hue}s you see.",
    ),
    "color_of": (
        "Tell me the {hue} of the {shape}.",
        "What {hue} would you say the {shape} is?",
        "In what {hue} is the {shape} painted?",
        "What {hue} is the {shape}?",
        "What {hue} is the {shape} in this {image}?",
        "What {hue} does the {shape} have?",
        "What {hue} has the {shape}?",
        "Which {hue} is the {shape}?",
        "Which {hue} does the {shape} have?",
        "What is the {hue} of the {shape}?",
        "What is the {shape}'s {hue}?",
        "What's the {hue} of the {shape}?",
        "Name the {hue} of the {shape}.",
        "Can you tell me the {hue} of the {shape}?",
        "Can you say what {hue} the {shape} is?",
        "Say which {hue} the {shape} has.",
        "Tell me what {hue} the {shape} is.",
        "In which {hue} is the {shape} drawn?",
        "The {shape} is what {hue}?",
        "{shape}: which {hue}?",
        "Name the {shape}'s {hue}.",
        "Tell me the {shape}'s {hue}.",
        "Which is the {shape}'s {hue}?",
    ),
    "how_many": (
        "Tell me how many {object}s you found.",
        "What number of {object}s do you count here?",
        "How many {object}s would you say this {image} has?",
        "How many {object}s are there?",
        "How many {object}s are in this {image}?",
        "How many {object}s are in the {image}?",
        "How many {object}s do you see?",
        "How many {object}s can you see?",
        "How many {object}s does the {image} show?",
        "How many {object}s can you count?",
        "How many are there?",
        "How many are there in all?",
        "What is the number of {object}s?",
        "Count the {object}s.",
        "Count them.",
        "Please count the {object}s in the {image}.",
        "Can you count the {object}s?",
        "Say how many {object}s there are.",
        "Tell me the number of {object}s.",
        "How many {object}s have you drawn?",
    ),
    "how_many_of": (
        "Tell me how many {things} you found.",
        "What number of {things} do you count here?",
        "How many {things} would you say this {image} has?",
        "How many {things} are there?",
        "How many {things} are in this {image}?",
        "How many {things} are in the {image}?",
        "How many {things} do you see?",
        "How many {things} can you see?",
        "How many {things} can you count?",
        "How many {things} does the {image} show?",
        "How many of them are {things}?",
        "How many of the {object}s are {things}?",
        "What is the number of {things}?",
        "Count the {things}.",
        "Please count the {things} in the {image}.",
        "Can you count the {things}?",
        "Say how many {things} there are.",
        "Tell me the number of {things}.",
        "The number of {things} is what?",
    ),
    "beside": (
        "Tell me what is {relation} the {shape}.",
        "Which {object} did you find {relation} the {shape}?",
        "{relation} the {shape}, what do you see?",
        "What is {relation} the {shape}?",
        "What's {relation} the {shape}?",
        "What {object} is {relation} the {shape}?",
        "Which {object} is {relation} the {shape}?",
        "What do you see {relation} the {shape}?",
        "What can you see {relation} the {shape}?",
        "What is there {relation} the {shape}?",
        "Is there anything {relation} the {shape}, and what?",
        "Name what is {relation} the {shape}.",
        "Say what is {relation} the {shape}.",
        "Can you tell me what is {relation} the {shape}?",
        "{relation} the {shape} is what?",
    ),
    "where": (
        "Tell me where the {shape} is.",
        "At what place is the {shape}?",
        "Where did you find the {shape}?",
        "Where is the {shape}?",
        "Where's the {shape}?",
        "Where is the {shape} in this {image}?",
        "Where do you see the {shape}?",
        "Where can the {shape} be seen?",
        "Where does the {shape} stand?",
        "In what place is the {shape}?",
        "What is the place of the {shape}?",
        "Where would I find the {shape}?",
        "Where should I look for the {shape}?",
        "Where could one see the {shape}?",
        "Where might the {shape} be?",
        "Where has the {shape} been put?",
        "Where in the {image} is the {shape}?",
        "Whereabouts is the {shape}?",
        "Where was the {shape} drawn?",
        "What is the position of the {shape}?",
        "On which side is the {shape}?",
        "The {shape} is where?",
        "Show me where the {shape} is.",
        "Is the {shape} left, right, above or below?",
        "Can you tell me where the {shape} is?",
        "Say where the {shape} is.",
    ),
    "is_beside": (
        "Tell me whether the {first} is {relation} the {second}.",
        "Would you say the {first} is {relation} the {second}?",
        "Did you find the {first} {relation} the {second}?",
        "Is the {first} {relation} the {second}?",
        "Is the {first} drawn {relation} the {second}?",
        "Is there a {first} {relation} the {second}?",
        "Do you see the {first} {relation} the {second}?",
        "Can you see a {first} {relation} the {second}?",
        "Does the {first} stand {relation} the {second}?",
        "Is it true that the {first} is {relation} the {second}?",
        "The {first} is {relation} the {second}, right?",
        "Please tell me if the {first} is {relation} the {second}.",
        "Does the {image} show the {first} {relation} the {second}?",
    ),
}
"""Wordings of each kind of question (`asking.KINDS`)."""

CLAUSES: Mapping[str, tuple[str, ...]] = {
    "match": (
        "{if_} this is {prompt}",
        "{if_} this {image} is {prompt}",
        "{if_} the {image} matches: {prompt}",
        "{if_} it fits the prompt: {prompt}",
        "{if_} that is a correct description: {prompt}",
        "{if_} what I asked for is there: {prompt}",
    ),
    "there": (
        "{if_} there is {thing}{here}",
        "{if_} {thing} is {shown}{here}",
        "{if_} you {see} {thing}{here}",
        "{if_} you can {see} {thing}",
        "{if_} the {image} has {thing}",
        "{if_} {thing} is one of the {object}s",
    ),
    "any": (
        "{if_} there are any {things}{here}",
        "{if_} you {see} any {things}{here}",
        "{if_} any {things} are {shown}{here}",
        "{if_} the {image} has {things}",
    ),
    "number": (
        "{if_} there are {number} {things}{here}",
        "{if_} you {see} {number} {things}",
        "{if_} {number} {things} are {shown}{here}",
        "{if_} the number of {things} is {number}",
    ),
    "it_color": (
        "{if_} it is {color}",
        "{if_} this is {color}",
        "{if_} the {object} is {color}",
        "{if_} its {hue} is {color}",
        "{if_} the {object}{here} is {color}",
    ),
    "it_shape": (
        "{if_} it is {thing}",
        "{if_} this is {thing}",
        "{if_} the {object} is {thing}",
        "{if_} what you {see} is {thing}",
    ),
    "color_is": (
        "{if_} the {shape} is {color}",
        "{if_} the {hue} of the {shape} is {color}",
        "{if_} the {shape}'s {hue} is {color}",
        "{if_} the {shape}{here} is {color}",
        "{if_} you {see} a {color} {shape}",
    ),
    "describe": (
        "what is in this {image}",
        "what is {shown}{here}",
        "what you {see}{here}",
        "what you can {see}",
        "what the {image} shows",
        "what there is{here}",
        "what has been drawn",
        "what can be seen",
    ),
    "which_shape": (
        "what shape this is",
        "which shape it is",
        "which shape is {shown}{here}",
        "what shape you {see}{here}",
        "what shape the {object} has",
        "what its shape is",
        "what shape the {object} is",
        "what this shape is called",
    ),
    "which_shapes": (
        "what shapes there are",
        "which shapes are {shown}{here}",
        "which shapes you {see}{here}",
        "what the shapes are",
    ),
    "shape_of": (
        "what shape the {color} {object} has",
        "which shape is {color}",
        "what the {color} {object} is",
        "what shape you {see} in {color}",
        "how the {color} one is shaped",
        "what is {color}",
    ),
    "which_color": (
        "what {hue} it is",
        "which {hue} this is",
        "which {hue} the {object} has",
        "what {hue} you {see}{here}",
        "what its {hue} is",
        "what {hue} the {object}{here} is",
        "what {hue} is {shown}",
    ),
    "which_colors": (
        "what {hue}s there are",
        "which {hue}s are {shown}{here}",
        "which {hue}s you {see}{here}",
        "what {hue}s the {object}s have",
        "which {hue}s have been used",
    ),
    "color_of": (
        "what {hue} the {shape} is",
        "which {hue} the {shape} has",
        "what the {hue} of the {shape} is",
        "what the {shape}'s {hue} is",
        "in which {hue} the {shape} is {shown}",
        "what {hue} the {shape}{here} is",
    ),
    "how_many": (
        "how many {object}s there are{here}",
        "how many {object}s you {see}{here}",
        "how many {object}s are {shown}{here}",
        "what the number of {object}s is",
    ),
    "how_many_of": (
        "how many {things} there are{here}",
        "how many {things} you {see}{here}",
        "how many {things} are {shown}{here}",
        "what the number of {things} is",
    ),
    "beside": (
        "what is {relation} the {shape}",
        "what you {see} {relation} the {shape}",
        "which {object} is {relation} the {shape}",
        "what is {shown} {relation} the {shape}",
    ),
    "where": (
        "where the {shape} is",
        "where you {see} the {shape}",
        "where the {shape} is {shown}",
        "where the {shape} is placed",
        "where one can find the {shape}",
    ),
    "is_beside": (
        "{if_} the {first} is {relation} the {second}",
        "{if_} the {first} is {shown} {relation} the {second}",
        "{if_} you {see} the {first} {relation} the {second}",
    ),
}
"""Indirect questions of each kind, which follow one of `OPENERS`."""
OPENERS = (
    *(
        "Tell me {}.",
        "Please tell me {}.",
        "Can you tell me {}?",
        "Could you tell me {}?",
        "Would you tell me {}?",
        "Say {}.",
    ),
    *(
        "Please say {}.",
        "Can you say {}?",
        "Do you know {}?",
        "Do you see {}?",
        "Can you see {}?",
        "I want to know {}.",
    ),
    *(
        "I would know {}.",
        "I wonder {}.",
        "I ask myself {}.",
        "Let me know {}.",
        "Find out {}.",
        "Have a look {}.",
        "Check {}.",
    ),
    *(
        "Can you find out {}?",
        "Could you say {}?",
        "Please check {}.",
        "I need to know {}.",
        "My question is {}.",
        "Answer {}.",
    ),
    *(
        "Will you tell me {}?",
        "I am asking {}.",
        "It would help to know {}.",
        "Are you able to say {}?",
        "Now tell me {}.",
    ),
)
DIRECT: Mapping[str, tuple[str, ...]] = {
    "there": (
        "Is there {thing}{here}?",
        "Is {thing} {shown}{here}?",
        "Can you {see} {thing}{here}?",
        "Can you {see} {thing}?",
        "Can you {see} {thing} or not?",
        "Can we {see} {thing}{here}?",
        "Do you {see} {thing}{here}?",
        "Could you {see} {thing}{here}?",
        "Can {thing} be {seen}{here}?",
        "Is {thing} to be {seen}{here}?",
        "Do we {see} {thing}{here}?",
    ),
    "any": (
        "Are there any {things}{here}?",
        "Are {things} {shown}{here}?",
        "Can you {see} any {things}{here}?",
        "Can you {see} any {things} or none?",
        "Do you {see} any {things}{here}?",
        "Can any {things} be {seen}{here}?",
    ),
    "number": (
        "Are there {number} {things}{here}?",
        "Are {number} {things} {shown}{here}?",
        "Do you {see} exactly {number} {things}{here}?",
        "Can {number} {things} be {seen}{here}?",
    ),
    "it_color": (
        "Is the {object}{here} {color}?",
        "Is the {object} that you {see} {color}?",
        "Is it {shown} in {color}?",
    ),
    "it_shape": (
        "Is the {object}{here} {thing}?",
        "Is what is {shown} {thing}?",
        "Do you {see} {thing}, or what is it?",
    ),
    "color_is": (
        "Is the {shape}{here} {color}?",
        "Is the {shape} {shown} in {color}?",
        "Do you {see} the {shape} in {color}?",
    ),
    "describe": (
        "What is {shown}{here}?",
        "What do you {see}{here}?",
        "What can you {see}{here}?",
        "What can be {seen}{here}?",
        "What have you {seen}{here}?",
        "What is to be {seen}{here}?",
        "What all do you {see}{here}?",
    ),
    "which_shape": (
        "What shape is {shown}{here}?",
        "Which shape do you {see}{here}?",
        "What shape can you {see}{here}?",
        "What shape can be {seen}{here}?",
        "What is the shape{here} called?",
    ),
    "which_shapes": (
        "What shapes are {shown}{here}?",
        "Which shapes do you {see}{here}?",
        "Which shapes can be {seen}{here}?",
        "What are the shapes{here} called?",
    ),
    "shape_of": (
        "What shape is {shown} in {color}?",
        "Which {object} do you {see} in {color}?",
        "What is the {color} {object}{here}?",
        "What is the {color} shape called?",
    ),
    "which_color": (
        "What {hue} is {shown}{here}?",
        "Which {hue} do you {see}{here}?",
        "What {hue} can be {seen}{here}?",
        "What is the {hue} of the {object}{here}?",
    ),
    "which_colors": (
        "What {hue}s are {shown}{here}?",
        "Which {hue}s do you {see}{here}?",
        "Which {hue}s can be {seen}{here}?",
        "Which {hue}s have been used{here}?",
    ),
    "color_of": (
        "What {hue} is the {shape}{here}?",
        "In which {hue} is the {shape} {shown}{here}?",
        "What {hue} do you {see} on the {shape}?",
        "What is the {hue} of the {shape}{here}?",
    ),
    "how_many": (
        "How many {object}s are {shown}{here}?",
        "How many {object}s do you {see}{here}?",
        "How many {object}s can you {see}{here}?",
        "How many {object}s can be {seen}{here}?",
    ),
    "how_many_of": (
        "How many {things} are {shown} so far?",
        "How many {things} do you {see}{here}?",
        "How many {things} can you {see}{here}?",
        "How many {things} can be {seen}{here}?",
    ),
    "beside": (
        "What is {shown} {relation} the {shape}?",
        "What do you {see} {relation} the {shape}?",
        "What can be {seen} {relation} the {shape}?",
        "Which {object} do you {see} {relation} the {shape}?",
    ),
    "where": (
        "Where is the {shape} {shown}?",
        "Where do you {see} the {shape}{here}?",
        "Where can the {shape} be {seen}?",
        "Where have you {seen} the {shape}?",
    ),
    "is_beside": (
        "Is the {first} {shown} {relation} the {second}?",
        "Do you {see} the {first} {relation} the {second}?",
        "Can the {first} be {seen} {relation} the {second}?",
    ),
}
"""More direct questions, with words of choice in the places {see}, {seen}, {shown} and {here}."""
_SEE = (
    *(
        "see",
        "find",
        "spot",
        "notice",
        "recognise",
        "make out",
        "detect",
        "observe",
        "discover",
        "perceive",
        "identify",
        "discern",
    ),
    *("recognize", "view", "locate"),
)
_SEEN = (
    *(
        "seen",
        "found",
        "spotted",
        "noticed",
        "recognised",
        "made out",
        "detected",
        "observed",
        "discovered",
        "perceived",
    ),
    *("identified", "discerned", "recognized"),
)
UNKNOWN = 0.08
"""How often one of these verbs is a word that does not exist: what a question means is to be read from its other words."""
_SHOWN = (
    *(
        "shown",
        "visible",
        "drawn",
        "painted",
        "depicted",
        "present",
        "placed",
        "displayed",
        "pictured",
        "found",
        "set",
        "put",
    ),
    *(
        "situated",
        "positioned",
        "standing",
        "sitting",
        "resting",
        "hiding",
        "hidden",
        "kept",
        "arranged",
        "marked",
        "sketched",
    ),
    *(
        "illustrated",
        "portrayed",
        "presented",
        "exhibited",
        "featured",
        "included",
        "contained",
        "rendered",
        "laid out",
    ),
)
_HERE = (
    "",
    "",
    "",
    " here",
    " in this {}",
    " in the {}",
    " in it",
    " there",
    " anywhere",
    " somewhere",
    " on this {}",
    " on the {}",
)

BEFORE = (
    "Please: ",
    "Now, ",
    "So, ",
    "Hey, ",
    "Hi! ",
    "Tell me: ",
    "A question: ",
    "OK. ",
    "And ",
    "Well, ",
    "Look at this. ",
)
BEFORE_QUESTION = 0.06
"""How often one of `BEFORE` stands before a question."""

REQUESTS = (
    *world.REQUEST_WORDINGS,
    *(wording.replace("{prompt}", "{things}") for wording in world.REQUEST_WORDINGS if "{prompt}" in wording),
    "{prompt}",
    "{prompt}.",
    "{things}",
    "{things}",
    "Draw {things}",
    "Draw {things}.",
    "Draw me {things}",
    "Draw {prompt}.",
    "Make {things}.",
    "Make me {prompt}.",
    "Make a picture of {things}.",
    "Paint {things}.",
    "Generate {things}",
    "Generate an image of {things}.",
    "Create {prompt}.",
    "Create an image of {things}",
    "Please draw me {things}",
    "Please generate {prompt}.",
    "Please show me {things}.",
    "Please make {prompt}",
    "Can you draw me {things}?",
    "Can you make {prompt}?",
    "Can you paint {things}?",
    "Can you please draw {things}?",
    "Would you draw {things}?",
    "Will you draw {things} for me?",
    "I want to see {things}.",
    "I want you to draw {things}.",
    "I need {prompt}.",
    "I'd like {prompt}.",
    "We want {things}.",
    "Let me have {things}",
    "Let us see {things}.",
    "Give me {things}",
    "Give me {prompt}.",
    "Get me {prompt}.",
    "How about {things}?",
    "Can I have {things}?",
    "Can I see {prompt}?",
    "May I see {things}?",
    "Let me see {things}.",
    "I'd love {prompt}.",
    "I'd love a picture of {things}.",
    "I would love {things}.",
    "I would really like {things}.",
    "We would like {prompt}.",
    "Would you paint {things} for me?",
    "Would you make {prompt}?",
    "Would you show me {things}?",
    "Try to draw {things}.",
    "Could you draw {things}?",
    "Could you draw {prompt}?",
    "Could you generate {prompt}?",
    "Could you give me {things}?",
    "Could you paint {things}?",
    "Could you create {prompt}?",
    "Could you please make {prompt}?",
    "Could we have {things}?",
    "Please create {prompt}.",
    "Please create an image of {things}.",
    "Please make a picture of {things}.",
    "Please paint a picture of {things}.",
    "Please give me {things}.",
    "Create a picture of {things}.",
    "Draw a picture of {things}.",
    "Show {things}.",
    "Produce {prompt}.",
    "It would be nice to see {things}.",
    "I am looking for {prompt}.",
    "My wish is {things}.",
    "Now draw {things}.",
    "Hello, can you draw {things}?",
    "Next, {things}.",
    "picture of {things}",
    "a picture of {things}",
    "an image of {things}",
    "image: {things}",
)
"""Requests for a picture: {prompt} is "a photo of …", {things} what follows "a photo of"."""

TALK = (
    *world.CHATS,
    "Yo",
    "Bye",
    "OK",
    "Yes",
    "No",
    "Good evening",
    "Nice to meet you",
    "Well done!",
    "I am tired.",
    "I like you.",
    "Do you like me?",
    "Can you sing?",
    "Can you think?",
    "Are you a machine or a person?",
    "Are you there?",
    "Is it raining?",
    "Is it late?",
    "Are you happy?",
    "Do you sleep?",
    "Do you know me?",
    "Is two more than one?",
    "Is France a country?",
    "Can I go home?",
    "Will it rain tomorrow?",
    "Did you sleep well?",
    "What is your favourite food?",
    "What is love?",
    "Where are you from?",
    "Where do you live?",
    "Where is my phone?",
    "When is lunch?",
    "Who is there?",
    "Who won the game?",
    "Why do we dream?",
    "How do I get to the station?",
    "How far is the moon?",
    "How does a car work?",
    "Write a letter to my mother.",
    "Write me a song about spring.",
    "Translate this to French.",
    "Give me a recipe for soup.",
    "Give me some advice.",
    "Tell me something.",
    "Tell me a secret.",
    "Explain how planes fly.",
    "Sing a song.",
    "Play some music.",
    "Set an alarm for six.",
    "Solve this equation.",
    "Say something nice.",
    "Read me the news.",
    "Count to ten.",
    "What do you think of {noun}?",
    "What is {noun}?",
    "What's {noun}?",
    "Who invented {noun}?",
    "Why is {noun} so big?",
    "How do I buy {noun}?",
    "How much is {noun}?",
    "How old is {noun}?",
    "Do you like {noun}?",
    "Do you have {noun}?",
    "Have you ever seen {noun}?",
    "Where can I find {noun}?",
    "Can {noun} swim?",
    "Tell me a story about {noun}.",
    "Tell me a joke about {noun}.",
    "Write a poem about {noun}.",
    "Write a story of {noun} and {other}.",
    "Is {noun} bigger than {other}?",
    "I have {noun} at home.",
    "My friend has {noun}.",
    "Explain {noun} to me.",
)
"""Small talk, with nouns of `NOUNS` in the places {noun} and {other}."""

NOUNS = tuple(
    """dog puppy kitten cow bull sheep lamb goat pig hen rooster chicken duck goose turkey swan eagle owl hawk parrot crow raven
    pigeon sparrow penguin ostrich flamingo peacock bird fish shark whale dolphin trout crab shrimp octopus squid
    jellyfish starfish seal otter beaver frog toad turtle tortoise lizard snake crocodile alligator dinosaur dragon unicorn mouse
    rat rabbit hare squirrel hedgehog fox wolf bear panda koala kangaroo monkey gorilla chimpanzee lion tiger leopard cheetah
    elephant rhino hippo camel llama donkey deer moose reindeer buffalo bat bee wasp ant spider butterfly beetle ladybug fly
    mosquito snail worm scorpion pony animal insect pet
    man woman boy girl child baby person king queen prince princess knight wizard witch doctor nurse teacher student farmer
    soldier policeman sailor pilot driver chef cook waiter painter singer dancer actor clown ghost zombie angel monster alien
    mermaid hero family friend mother father brother sister grandpa uncle crowd team couple artist scientist cowboy ninja
    house home cottage cabin castle palace tower church temple mosque school hospital hotel shop market office factory barn
    garage bridge road street highway tunnel city town village airport station harbor lighthouse pyramid statue museum library
    theater stadium park playground farm kitchen bathroom bedroom room hall stairs door window roof wall fence gate chimney
    table chair sofa couch bed desk shelf lamp mirror clock carpet curtain pillow blanket vase basket box bag bucket bowl cup
    mug glass plate fork knife spoon pan pot oven stove fridge toaster blender broom mop brush comb soap towel
    toilet bathtub sink shower key lock hammer saw screwdriver drill nail screw rope chain wheel gear engine battery
    car bus truck van taxi bike bicycle scooter motorbike train tram subway plane airplane jet rocket spaceship boat ship
    sailboat yacht ferry raft kayak balloon parachute tank cart wagon sled ambulance crane
    apple pear banana cherry grape lemon lime peach plum mango melon watermelon strawberry blueberry raspberry coconut tomato
    potato carrot onion garlic pepper pumpkin corn bean pea cabbage lettuce spinach mushroom bread toast sandwich pizza pasta
    noodle rice soup salad steak sausage bacon egg cheese butter milk coffee tea juice water wine beer cookie biscuit pie
    donut muffin pancake chocolate candy icecream honey jam sugar salt sushi taco hotdog fries
    shirt dress skirt coat jacket sweater trousers jeans sock shoe boot glove scarf hat cap belt tie watch bracelet earring
    crown sunglasses backpack purse wallet
    book newspaper magazine letter envelope stamp pen pencil eraser ruler notebook map globe flag coin banknote ticket
    phone telephone computer laptop keyboard tablet television radio camera printer speaker headphone satellite
    guitar piano drum flute saxophone harp cello bell whistle
    ball football basketball baseball tennis racket bat golf hockey puck bowling dart chess card dice doll teddy toy puzzle
    kite yoyo swing slide trampoline
    tree oak pine palm bush flower rose tulip daisy lily orchid leaf branch grass moss fern forest jungle wood
    mountain hill valley cliff cave rock stone sand desert island beach ocean sea river stream pond swamp sky cloud rain
    snow snowflake snowman fog storm lightning rainbow sunset sunrise sun moon planet earth comet galaxy fire flame smoke
    path
    face eye ear nose mouth tooth tongue hair beard hand finger arm leg foot knee head skull skeleton brain bone shadow
    sword shield bow spear gun cannon bomb anchor treasure chest lantern torch fireplace
    landscape portrait selfie cartoon painting sculpture logo poster sign word number sentence poem
    crosswalk ringmaster heartbeat redhead bluebird blackboard orangutan
    diamondback starship crossbow """.split()  # noqa: SIM905 - a list of hundreds of quoted words is hard to read
)
"""Nouns of outside requests and small talk."""

ADJECTIVES = tuple(
    """big small huge tiny little large tall short long fat thin wide old new young happy sad angry sleepy hungry funny scary cute
    beautiful ugly pretty shiny dark bright wet dry hot cold frozen burning broken wooden golden silver metal plastic glassy furry
    fluffy hairy striped dotted spotted checkered transparent invisible glowing flying running jumping sleeping dancing singing
    smiling laughing crying futuristic ancient modern magic magical mysterious peaceful serene surreal realistic abstract
    japanese french royal tropical medieval wild tame lonely giant rusty dirty clean empty full round flat curved crooked soft
    hollow upside-down three-dimensional neon pastel rotating blurry""".split()  # noqa: SIM905 - a list of hundreds of quoted words is hard to read
)

PLACES = tuple(
    """in the rain;in the snow;in space;on a table;on the moon;on a beach;at night;at sunset;in a forest;in the kitchen;on a wall;
    under a tree;on a mountain;in the sea;at the zoo;in a box;on a chair;by the river;in the city;on the street;with a hat;with a
    smile;with wings;in the desert;in winter;in the sky;on fire;in black and white;in the style of Picasso;made of wood;made of
    glass;on a hill;in a bowl;with two eyes;with long hair;in a cave;on the grass;in Paris;at school;in a boat;during a storm;
    holding a flag;eating a sandwich;riding a bike;playing football;reading a book;wearing a coat;on a plate;near a house;full of
    flowers;over the city;in front of a house;behind a fence;in oil paint;as a cartoon;in pixel art;in 3d;with a dark background;
    on a red background;with a border""".replace("\n    ", "").split(";")
)

OTHER_COLORS = tuple(
    """brown grey gray white cyan magenta teal navy olive maroon violet indigo gold silver bronze lavender lilac mint peachy cream
    ivory tan khaki scarlet ruby azure aqua aquamarine plum mauve rose copper amber charcoal rainbow colorful multicolored
    colourless striped lightgreen ultramarine rust sand""".split()  # noqa: SIM905 - a list of hundreds of quoted words is hard to read
)
OTHER_SHAPES = tuple(
    """pentagon heptagon rectangle oval ellipse cube sphere cone pyramid prism trapezoid rhombus kite crescent moon arrow line dot
    point spiral wave curve semicircle polygon octahedron pentagram donut torus spade club clover gear cloud drop letter numeral
    bar stripe grid net box stick ball tube zig bolt hourglass starfish crown leaf""".split()  # noqa: SIM905 - a list of hundreds of quoted words is hard to read
)
OTHER_NUMBERS = tuple(
    """five six eight ten eleven twelve thirteen fourteen sixteen twenty forty fifty hundred thousand many several dozens 5 6 8 10
    11 12 20 50 100 1000 zero 0""".split()  # noqa: SIM905 - a list of hundreds of quoted words is hard to read
)
_FIGURES = [figure for figure in map(str, range(5, 70)) if figure not in asking.NUMBERS]
OTHER_RELATIONS = (
    *(
        "inside",
        "on top of",
        "behind",
        "in front of",
        "next to",
        "near",
        "between two",
        "around",
        "leaning on",
        "inside of",
    ),
    *(
        "overlapping",
        "crossing",
        "bigger than",
        "smaller than",
        "looking at",
        "on",
        "in",
        "within",
        "holding",
        "chasing",
    ),
    *(
        "against",
        "along",
        "far from",
        "close to",
        "with",
        "without",
        "made of",
        "surrounded by",
        "balancing on",
        "instead of",
    ),
    *(
        "in the middle of",
        "on the edge of",
        "at the centre of",
        "in the light of",
        "at the foot of",
        "by the side of",
        "in the corner of",
    ),
    *(
        "on the back of",
        "in the arms of",
        "at the end of",
        "hugging",
        "eating",
        "kissing",
        "pushing",
        "falling on",
        "tied to",
        "glued to",
    ),
    *(
        "cut out of",
        "hidden by",
        "drawn on",
        "filled with",
        "as big as",
        "older than",
        "melting into",
        "turning into",
        "and not",
    ),
)
SUBJECTS = (
    *(
        "the Eiffel Tower",
        "Paris",
        "New York",
        "London",
        "Mount Everest",
        "the Mona Lisa",
        "Albert Einstein",
        "Napoleon",
    ),
    *(
        "Batman",
        "Mickey Mouse",
        "Santa Claus",
        "the Great Wall",
        "Africa",
        "the ocean",
        "the future",
        "my house",
        "me",
        "you",
    ),
    *("yourself", "something", "something nice", "anything", "nothing", "love", "happiness", "music", "time", "peace"),
    *(
        "people",
        "animals",
        "dogs",
        "trees",
        "birds",
        "flowers",
        "cars",
        "houses",
        "mountains",
        "fruit",
        "food",
        "children",
    ),
    *(
        "a peaceful place",
        "a nice day",
        "a city at night",
        "a starry sky",
        "a family dinner",
        "a birthday party",
        "a battle",
    ),
    *(
        "a red sky",
        "blue jeans",
        "green grass",
        "black clouds",
        "a pink panther",
        "orange juice",
        "a yellow cab driver",
    ),
)


def _pseudo(rng: random.Random) -> str:
    """A word that does not exist: the beginning of one noun and the end of another, or letters."""
    if rng.random() < 0.5:
        first, second = rng.sample(NOUNS, 2)
        word = first[: rng.randrange(1, 5)] + second[-rng.randrange(2, 6) :]
    else:
        sounds = ("bcdfghjklmnprstvwz", "aeiou")
        word = "".join(rng.choice(sounds[i % 2]) for i in range(rng.randrange(3, 9)))
    known = {*world.SHAPES, *world.COLORS, *map(world.plural, world.SHAPES), *asking.NOUNS}
    return _pseudo(rng) if word in known else word


def noun(rng: random.Random) -> str:
    """Something that the world does not have; a third of the words do not exist."""
    return rng.choice(NOUNS) if rng.random() < 0.65 else _pseudo(rng)


def _relation(rng: random.Random) -> str:
    """A relation that the world does not have."""
    which = rng.random()
    if which < 0.5:
        return rng.choice(OTHER_RELATIONS)
    if which < 0.75:
        return f"{rng.choice(('in', 'on', 'at', 'by', 'under', 'out of', 'from'))} the {noun(rng)} of"
    return rng.choice(
        (
            f"{_pseudo(rng)}ing",
            f"{_pseudo(rng)}ed {rng.choice(('by', 'with', 'to', 'into', 'through', 'over'))}",
            _pseudo(rng),
        )
    )


def outside(rng: random.Random) -> str:
    """What an outside request asks for."""
    a, an = world.with_article, noun
    shape, second = rng.sample(world.SHAPES, 2)
    color = rng.choice(world.COLORS)
    adjective = rng.choice(ADJECTIVES)
    which = rng.choice((*range(26), 11, 16, 19, 19, 24, 24, 25))
    if which < 4:
        return a(an(rng))
    if which == 4:
        return f"{a(an(rng))} and {a(an(rng))}"
    if which == 5:
        return f"{a(an(rng))} {rng.choice(PLACES)}"
    if which == 6:
        return a(f"{adjective} {an(rng)}")
    if which == 7:
        return a(f"{color} {an(rng)}")
    if which == 8:
        return a(f"{rng.choice((rng.choice(OTHER_COLORS), an(rng)))} {rng.choice(world.SHAPES)}")
    if which == 9:
        return a(f"{color} {rng.choice((rng.choice(OTHER_SHAPES), an(rng)))}")
    if which == 10:
        return a(f"{rng.choice(OTHER_COLORS)} {rng.choice((*OTHER_SHAPES, an(rng)))}")
    if which == 11:
        number = rng.choice(
            (
                rng.choice(OTHER_NUMBERS),
                rng.choice(_FIGURES),
                _pseudo(rng),
                f"{_pseudo(rng)}{rng.choice(('teen', 'ty'))}",
            )
        )
        return f"{number} {world.plural(shape)}"
    if which == 12:
        return f"{rng.choice(('two', 'three', 'four', *OTHER_NUMBERS))} {an(rng)}s"
    if which == 13:
        return world.listed([a(shape), a(an(rng))] if rng.random() < 0.5 else [a(an(rng)), a(shape)])
    if which == 14:
        return f"{a(an(rng))} {rng.choice(world.RELATIONS)} a {shape}"
    if which == 15:
        return f"a {shape} {rng.choice(world.RELATIONS)} {a(an(rng))}"
    if which == 16:
        return f"a {shape} {_relation(rng)} a {second}"
    if which == 17:
        return f"a {shape} {rng.choice(PLACES)}"
    if which == 18:
        return a(f"{adjective} {rng.choice(('', color + ' '))}{shape}")
    if which == 19:
        few = rng.sample(world.SHAPES, rng.randrange(2, len(world.SHAPES) + 1))
        many = [rng.choice(few) for _ in range(rng.choice((5, 5, 5, 6, 7)))]
        colored = rng.choice((0, 0, 0, 0.3, 1))
        return world.listed(
            [a(f"{rng.choice(world.COLORS)} {name}" if rng.random() < colored else name) for name in many]
        )
    if which == 20:
        return rng.choice(SUBJECTS)
    if which == 21:
        return f"{a(an(rng))} {rng.choice(OTHER_RELATIONS)} {a(an(rng))}"
    if which == 22:
        return f"{an(rng)} {an(rng)}" if rng.random() < 0.5 else f"the {an(rng)}"
    if which == 23:
        return world.listed([a(f"{color} {shape}"), a(f"{rng.choice((rng.choice(OTHER_COLORS), an(rng)))} {second}")])
    relation, other = rng.choice(world.RELATIONS), rng.choice(world.COLORS)
    if which == 24:
        return f"{a(rng.choice((f'{color} {shape}', shape)))} {relation} {a(f'{other} {second}')}"
    third = rng.choice(world.SHAPES)
    return f"a {shape} {relation} " + world.listed([a(second), a(third)])


_BEGIN = (
    *(
        "",
        "",
        "Please ",
        "Can you ",
        "Can you please ",
        "Could you ",
        "Could you please ",
        "Would you ",
        "Will you ",
        "Will you please ",
    ),
    *(
        "I want you to ",
        "I'd like you to ",
        "I'd love you to ",
        "I need you to ",
        "I ask you to ",
        "Try to ",
        "Let us ",
        "Let's ",
        "Now ",
    ),
    *(
        "Go ahead and ",
        "Kindly ",
        "You should ",
        "You could ",
        "You may ",
        "Just ",
        "Quickly ",
        "It is time to ",
        "Time to ",
        "Hey, ",
    ),
    *(
        "Hi, please ",
        "Hello, could you ",
        "Next, ",
        "Then ",
        "And now ",
        "Also ",
        "Are you able to ",
        "Is it possible to ",
        "Do ",
    ),
    *(
        "Might you ",
        "Why not ",
        "Can we ",
        "Could we ",
        "May I ask you to ",
        "Would you kindly ",
        "I beg you to ",
        "Be so kind and ",
    ),
)
_MAKE = (
    *(
        "draw",
        "draw",
        "draw me",
        "paint",
        "paint me",
        "sketch",
        "make",
        "make me",
        "create",
        "create for me",
        "generate",
        "render",
    ),
    *(
        "produce",
        "design",
        "illustrate",
        "compose",
        "craft",
        "prepare",
        "depict",
        "picture",
        "show",
        "show me",
        "show us",
        "give me",
    ),
    *(
        "bring me",
        "hand me",
        "get me",
        "send me",
        "offer me",
        "present",
        "build",
        "form",
        "doodle",
        "visualize",
        "have a go at",
    ),
    *(
        "let me see",
        "let me have",
        "imagine",
        "put together",
        "come up with",
        "deliver",
        "provide",
        "print",
        "serve me",
    ),
)
_WISH = (
    *(
        "I want",
        "I wish for",
        "I need",
        "I am after",
        "I am looking for",
        "I'd like",
        "I'd like to see",
        "I'd love",
        "I'd enjoy",
    ),
    *(
        "I hope to see",
        "I want to look at",
        "I long for",
        "I fancy",
        "I feel like",
        "I ask for",
        "I'm dreaming of",
        "We need",
    ),
    *(
        "We'd like",
        "We are looking for",
        "What I want is",
        "What I need is",
        "My wish is",
        "My prompt is",
        "The prompt is",
        "Let me see",
    ),
    *(
        "Let me view",
        "Let me watch",
        "Let me admire",
        "Let me have a look at",
        "Let us look at",
        "Let them see",
        "May I have",
    ),
    *(
        "May I look at",
        "Can I have",
        "Can I look at",
        "Can we get",
        "Could I get",
        "Could I see",
        "Could I have a look at",
        "How about",
    ),
    *(
        "What about",
        "It would be great to have",
        "Nothing but",
        "For me",
        "Once more",
        "This time",
        "One more",
        "Here I want",
    ),
    *(
        "I'd be happy with",
        "I would love to get",
        "I would be glad of",
        "I would prefer",
        "Time for",
        "Give us",
        "Show them",
    ),
)
_THINGS = (
    *("{things}",) * 6,
    *("{prompt}",) * 4,
    *(
        "a picture of {things}",
        "an image of {things}",
        "a drawing of {things}",
        "a painting of {things}",
        "a sketch of {things}",
    ),
)


def _request(rng: random.Random) -> str:
    """A wording of requests, from `REQUESTS` or put together from parts, none of evaluation's."""
    while True:
        if rng.random() < 0.5:
            return rng.choice(REQUESTS)
        begin = f"{rng.choice(_BEGIN)}{rng.choice(_MAKE)}" if rng.random() < 0.6 else rng.choice(_WISH)
        text = (
            f"{begin} {rng.choice(_THINGS)}{rng.choice(('', '.', '.', '?', ' for me', ' please', ', please.', ' now'))}"
        )
        text = text[:1].upper() + text[1:]
        if not asking.is_held_out_request(text):
            return text


def outside_request(rng: random.Random, bare: bool = True) -> str:
    """A request for what the world does not have, in varied words; without `bare`, none that is no more than the thing."""
    while True:
        wording, what = _wording_and_things(rng, outside(rng), bare)
        if (bare or "{" not in wording[:1]) and not asking.names_held_out(what):
            prefix = "a photo of " if rng.random() < 0.8 else ""
            text = wording.format(prompt=prefix + what, things=what)
            return _varied(rng, text)


NO_ARTICLES = 0.15
"""How often a wording of a request has its things without "a": "Show me red circle and blue star."."""
ALONE = 0.08
"""How often a request is nothing but its things without "a": "red circle"."""


def _wording_and_things(rng: random.Random, things: str, bare: bool) -> tuple[str, str]:
    """A wording of requests and the things that it is to have, at times without articles."""
    which = rng.random()
    if which < ALONE + NO_ARTICLES:
        things = re.sub(r"\ban? ", "", things)
    return "{things}" if which < ALONE and bare else _request(rng), things


def inside_request(rng: random.Random, prompt: str, bare: bool = True) -> str:
    """A request for a prompt ("a photo of …") in varied words; `bare` as in `outside_request`."""
    while True:
        wording, things = _wording_and_things(rng, _other_words(rng, prompt.removeprefix("a photo of ")), bare)
        if bare or "{" not in wording[:1]:
            break
    return _varied(rng, wording.format(prompt=f"a photo of {things}", things=things))


SAME = (
    ("left of", "to the left of"),
    ("right of", "to the right of"),
    ("left of", "on the left of"),
    ("right of", "on the right of"),
    ("below", "under"),
    ("below", "beneath"),
    ("above", "over"),
    ("two ", "2 "),
    ("three ", "3 "),
    ("four ", "4 "),
)
"""Words of the world, and others that mean the same in a request."""


def _other_words(rng: random.Random, things: str) -> str:
    if rng.random() < 0.85:
        return things
    known, other = rng.choice(SAME)
    return things.replace(known, other)


def talk(rng: random.Random) -> str:
    """Small talk in varied words."""
    text = rng.choice(TALK)
    return _varied(rng, text.format(noun=world.with_article(noun(rng)), other=world.with_article(noun(rng))))


def in_words(rng: random.Random, asked: asking.Question) -> str:
    """A question in varied words of training, none of evaluation's."""
    while True:
        text = _in_some_words(rng, asked)
        if not asking.is_held_out_wording(text):
            break
    if rng.random() < 0.15:
        text = text.replace("'", rng.choice(("’", "")))
    if rng.random() < BEFORE_QUESTION:
        text = rng.choice(BEFORE) + text
    return _varied(rng, text, ("", "?", ".", "!", "??", " ?"))


TITLE, UPPER = 0.1, 0.07
"""How often a text that `asking.varied` made is put in title case, and in capital letters: small letters are learnt sooner."""


def _varied(rng: random.Random, text: str, marks: Sequence[str] = ("", "?", ".", "!")) -> str:
    """As `asking.varied`, more often in title case and in capital letters."""
    text = asking.varied(rng, text, marks)
    which = rng.random()
    if which < TITLE:
        return re.sub(r"(['’])([A-Z])", lambda match: match[1] + match[2].lower(), text.title())
    return text.upper() if which < TITLE + UPPER else text


# What may stand before a conversation -----------------------------------------------------------------------------------------

OTHER_SYSTEM = 0.15
"""How often a conversation has another system message than `prompt.SYSTEM`."""
_ROLES = (
    *("assistant", "artist", "painter", "helper", "teacher", "critic", "model", "tool", "bot", "friend", "guide"),
    *("chatbot", "designer", "illustrator", "expert", "translator", "librarian", "comedian"),
)
_RULES = (
    "Answer briefly.",
    "Be kind.",
    "Be polite to the user.",
    "Always tell the truth.",
    "Use short sentences.",
    "Use simple words.",
    "Never talk about money.",
    "Do not repeat yourself.",
    "Think step by step.",
    "Think before you speak.",
    "Answer in English.",
    "Reply in French.",
    "Reply in capital letters.",
    "Speak like a child.",
    "Every answer is a poem.",
    "Draw what the user wants.",
    "Draw in the style of Monet.",
    "All pictures are black and white.",
    "Use bright colours.",
    "Your pictures are simple.",
    "You draw pictures and answer questions about them.",
    "You see pictures and describe them.",
    "You cannot draw.",
    "You are not a person.",
    "Your name is Alex.",
    "The user is called Maria.",
    "The user is an expert.",
    "Today is Monday.",
    "It is late.",
    "Our shop sells shoes.",
    "If you do not know the answer, say so.",
    "If the question is unclear, ask back.",
    "Questions are answered with yes or no.",
    "Describe only what you see.",
    "Give reasons for your answer.",
    "Only answer questions about art.",
    "Help the user.",
    "Follow all instructions.",
    "Stay calm.",
    "No jokes.",
    "Don't be rude!",
    "Style: watercolour",
    "Mode: chat",
    "language = en",
    "Temperature 0.7",
)
"""Sentences of system messages; evaluation has others (`asking.SYSTEMS`)."""


def system(rng: random.Random) -> str:
    """A system message: mostly `prompt.SYSTEM`, else one that changes nothing about what is to be replied."""
    if rng.random() >= OTHER_SYSTEM:
        return SYSTEM
    which = rng.random()
    if which < 0.06:
        return ""
    role = rng.choice(_ROLES) if rng.random() < 0.7 else noun(rng)
    who = world.with_article(f"{rng.choice(('', '', rng.choice(ADJECTIVES)))} {role}".strip())
    told = [f"You are {who}."] if rng.random() < 0.6 else []
    if which < 0.3:
        told.append(SYSTEM)
    told += rng.sample(_RULES, rng.choice((0, 1, 1, 1, 2, 2, 3)))
    if rng.random() < 0.2:
        told.append(" ".join(noun(rng) for _ in range(rng.randrange(1, 6))))
    rng.shuffle(told)
    text = rng.choice((" ", " ", " ", "\n")).join(told)
    return rng.choice((str, str, str, str, str.lower, str.upper))(text)


def _verb(rng: random.Random, verbs: Sequence[str]) -> str:
    return f"{_pseudo(rng)}ed" if rng.random() < UNKNOWN else rng.choice(verbs)


_FITTING = (
    *(
        "right",
        "true",
        "good",
        "fitting",
        "accurate",
        "proper",
        "faithful",
        "exact",
        "apt",
        "fair",
        "valid",
        "suitable",
        "correct",
    ),
    *("precise", "complete", "possible", "perfect", "reasonable", "truthful"),
)
_CAPTION = (
    "caption",
    "title",
    "account",
    "summary",
    "text",
    "prompt",
    "label",
    "statement",
    "name",
    "description",
    "heading",
    "line",
)
_DESCRIBE = (
    *(
        "describe",
        "summarise",
        "fit",
        "suit",
        "match",
        "caption",
        "label",
        "sum up",
        "characterise",
        "agree with",
        "tell of",
    ),
    *("correspond to", "go with", "belong to", "apply to", "hold for", "describe what you see in"),
)
_WANTED = (
    *(
        "I wanted",
        "I asked you for",
        "I wished for",
        "I ordered",
        "I hoped for",
        "I was promised",
        "They asked for",
        "My request was",
    ),
    *(
        "The prompt was",
        "The prompt said",
        "What I want is",
        "You were to draw",
        "You were asked for",
        "We wanted",
        "It should be",
    ),
    *("This should show", "My prompt was", "The request was", "The order was"),
)
_GOT = (
    *(
        "Did I get it?",
        "Is this it?",
        "Is it what I see?",
        "Have I got that?",
        "Does this fit?",
        "Is that right?",
        "Is it so?",
    ),
    *(
        "Does the {image} show that?",
        "Is it what this {image} shows?",
        "Is that what you drew?",
        "Did you draw that?",
        "Do they agree?",
    ),
    *(
        "Does the {image} match?",
        "Does that describe it?",
        "Is this what you made?",
        "Would you say so?",
        "Is that the case here?",
    ),
)


def _asked_to_match(rng: random.Random) -> str:
    """A question whether a prompt describes the picture, put together from parts."""
    which = rng.random()
    told = rng.choice(
        (
            "{prompt}",
            "{prompt}",
            "{prompt}",
            '"{prompt}"',
            "the prompt {prompt}",
            "the text {prompt}",
            "the words {prompt}",
        )
    )
    of = rng.choice(
        ("", "", " here", " for this {image}", " for it", " of the {image}", " of this", " for what you see")
    )
    if which < 0.35:
        verb = rng.choice(("Is", "Is", "Would", "Would", "Could", "Can", "Might", "Should", "May", "Was", "Will"))
        be = (
            "" if verb in ("Is", "Was") else rng.choice(("be ", "be ", "serve as ", "do as ", "count as ", "pass for "))
        )
        return f"{verb} {told} {be}{world.with_article(f'{rng.choice(_FITTING)} {rng.choice(_CAPTION)}')}{of}?"
    if which < 0.55:
        what = rng.choice(("it", "this", "the {image}", "this {image}", "the {image} here"))
        return f"{rng.choice(('Does', 'Would', 'Could', 'Can', 'Did', 'Might'))} {told} {rng.choice(_DESCRIBE)} {what}?"
    if which < 0.8:
        return f"{rng.choice(_WANTED)} {told}. {rng.choice(_GOT)}"
    call = rng.choice(
        (
            "call this",
            "call it",
            "call the {image}",
            "describe this as",
            "describe the {image} as",
            "caption it",
            "label this",
        )
    )
    return f"{rng.choice(('Would you', 'Could one', 'Can one', 'Can I', 'Would it be right to', 'Is it fair to', 'May we'))} {call} {told}?"


def _in_some_words(rng: random.Random, asked: asking.Question) -> str:
    which = rng.random()
    if asked.kind == "match" and rng.random() < 0.4:
        wording = _asked_to_match(rng)
    elif which < 0.35:
        wording = rng.choice(OPENERS).format(rng.choice(CLAUSES[asked.kind]))
    elif which < 0.6 and asked.kind in DIRECT:
        wording = rng.choice(DIRECT[asked.kind])
    else:
        wording = rng.choice(QUESTIONS[asked.kind])
    here = rng.choice(_HERE).format(rng.choice(asking.IMAGE_WORDS))
    more = {"see": rng.choice(_SEE), "seen": _verb(rng, _SEEN), "shown": _verb(rng, _SHOWN), "here": here}
    text = asking.worded(rng, wording, {**asked.parts, **more, "if_": rng.choice(("if", "whether", "whether or not"))})
    if rng.random() < 0.3:
        text = text.replace("What is", "What's").replace("Where is", "Where's")
    return text
