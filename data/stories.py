"""The built-in corpus: a seeded generator of children's stories, in the spirit of TinyStories (Eldan and Li 2023).

A story draws a cast (who, where, what belongs to whom) and one of the plots below; each plot has a beginning, a problem
and an end, and says the same of its cast throughout. In a plot, `{slot}` stands for something of the cast, `{a slot}`
puts the right article before it, and `[this|that]` is a choice, which may hold slots and choices.
"""

import random
import re

NAMES = {
    "she": "Lily Anna Mia Zoe Ella Rosa Nora Ivy Lucy Clara Ruby Emma Maya Tess Nina Alma Greta Hazel Iris June Kira "
           "Lola Mabel Nelly Olive Penny Quinn Rita Stella Tilda Una Vera Wanda Yara Amy Bella Cora Daisy Edith Flora "
           "Gwen Hanna Ida Jenny Kate Lena Molly Nell Opal Pia Sara Tina Willa Pearl".split(),
    "he": "Tom Ben Max Sam Leo Tim Jack Finn Hugo Otto Milo Noah Oscar Felix Theo Adam Billy Carl Danny Eli Fred Gus "
          "Henry Ivan Jake Kurt Luke Mark Ned Owen Paul Ray Simon Toby Victor Will Zack Alfie Bruno Casper Dennis Emil "
          "Frank George Harvey Isaac Jonas Karl Lars Martin Nick Oliver Peter Robin".split(),
}
ANIMALS = ("rabbit fox bear mouse duck frog squirrel hedgehog beaver badger otter kitten puppy lamb pony piglet calf "
           "owl sparrow robin goose penguin turtle lizard monkey elephant lion tiger panda koala kangaroo giraffe "
           "zebra camel raccoon mole hamster donkey goat rooster swan deer wolf seal parrot chipmunk walrus ferret "
           "pelican ostrich crocodile leopard moose bison heron crow toad dolphin gazelle armadillo buffalo cheetah "
           "ermine hippo iguana jackal lemur lynx meerkat newt").split()
CRITTERS = ("ladybug snail beetle butterfly caterpillar cricket bee ant spider worm moth firefly grasshopper dragonfly "
            "tadpole chick duckling baby~bird baby~mouse small~fish gosling little~bat").split()
KIN = {"she": "Mom Grandma Aunt~May Aunt~Sue".split(), "he": "Dad Grandpa Uncle~Joe Uncle~Bob".split()}
WORKERS = ("baker farmer teacher doctor gardener fisherman carpenter postman shopkeeper tailor painter sailor miller "
           "librarian shepherd watchmaker cook beekeeper potter blacksmith mayor firefighter nurse plumber weaver "
           "mechanic musician pilot captain cobbler florist butcher").split()
TRAITS = ("kind brave curious shy clever cheerful quiet gentle lively careful stubborn playful patient proud friendly "
          "dreamy helpful sleepy busy funny polite honest thoughtful noisy bold calm eager graceful grateful hopeful "
          "jolly loyal lucky merry modest neat nimble serious silly smart sweet tidy wise witty adventurous daring "
          "dutiful earnest fearless generous nervous peaceful talkative thankful tireless trusty unlucky "
          "watchful").split()
SIZES = "little small tiny young".split()
COLORS = ("red blue green yellow orange purple pink white black brown silver golden gray striped spotted violet "
          "crimson turquoise cream scarlet beige bronze copper coral emerald indigo ivory lavender maroon navy olive "
          "peach ruby sapphire tan teal").split()
TOYS = ("ball kite doll drum train truck puzzle boat top wagon robot whistle teddy~bear yo-yo balloon scooter puppet "
        "hoop tambourine rocking~horse toy~car toy~plane toy~castle marble~box trumpet paper~plane jump~rope sled "
        "xylophone music~box pinwheel slingshot toy~dinosaur toy~pirate toy~tractor rattle").split()
WEARS = ("hat scarf coat mitten boot sock sweater ribbon cap shoe apron belt cape jacket slipper necklace bracelet "
         "raincoat umbrella backpack").split()
TREASURES = ("key button coin feather shell pebble ring bell acorn bead marble stamp medal crystal brooch compass "
             "locket thimble lantern spoon pinecone magnet pocket~watch stone~heart seashell fossil amulet candle "
             "goblet hourglass medallion nutcracker postcard statue telescope tile").split()
TOOLS = ("hammer shovel bucket rope ladder broom brush basket rake saw lamp net needle spade wheelbarrow hose jar pot "
         "blanket pillow").split()
FOODS = ("apple pie, carrot cake, honey bread, berry jam, pumpkin soup, cheese sandwiches, plum cake, nut cookies, "
         "pancakes, peach tarts, corn muffins, vegetable stew, rice pudding, lemon buns, noodle soup, banana bread, "
         "cherry pie, chocolate cookies, cinnamon rolls, potato pancakes, oatmeal, strawberry cake, ginger biscuits, "
         "mushroom soup").split(", ")
FRUITS = ("apple pear plum peach cherry banana orange strawberry melon grape fig apricot blueberry raspberry lemon "
          "coconut").split()
CROPS = "carrots beans tomatoes pumpkins sunflowers roses peas tulips radishes potatoes daisies onions cabbages".split()
PLACES = ("park forest meadow garden beach village farm valley orchard market harbor hill playground river lake island "
          "field pond library mill castle barn lighthouse bridge town~square schoolyard bakery cave desert mountain "
          "swamp museum station greenhouse windmill vineyard canyon jungle fairground cottage waterfall stable zoo "
          "circus airport bay chapel cornfield dairy fountain garage hotel inn kindergarten lagoon monastery "
          "observatory palace quarry reef temple theater tower trail warehouse workshop").split()
HIDING = ("under the bed, behind the couch, inside a boot, under a pile of leaves, behind the old oak, in the tall "
          "grass, on the roof of the shed, between two rocks, in the laundry basket, under the porch, beside the "
          "stream, inside a hollow log, on the top shelf, behind the curtain, under the kitchen table, in the pocket "
          "of an old coat, next to the well, in the mud near the gate, below the stairs, in a bird's nest, among the "
          "flower pots, in the doghouse, at the bottom of the toy box, behind the piano").split(", ")
WEATHER = ("sunny cloudy windy warm cool bright foggy snowy rainy quiet frosty golden chilly breezy hot misty").split()
TIMES = ("morning afternoon day evening").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SONGS = ("a song about the moon, a song about the sea, a marching song, a lullaby, a song about rain, a dancing song, "
         "a song about brave knights, a silly song about soup, a song about going home, a birthday song").split(", ")
GAMES = ("hide and seek, tag, hopscotch, catch, chess, dominoes, leapfrog, cards, blind man's buff, follow the leader, "
         "tug of war, marbles").split(", ")
SKILLS = ("swim, ride a bike, whistle, skate, juggle, tie a bow, climb trees, paint, read, dance, bake, row a boat, "
          "play the flute, jump rope, stand on one hand, fly a kite, play the drums, knit, ski, count to one "
          "hundred").split(", ")
SHAPES = ("a star, a cat, a heart, a ship, a crown, a fish, a dragon, a tree, a horse, a mushroom, a snowman, a "
          "whale").split(", ")
NUMBERS = "three four five six seven eight nine ten eleven twelve".split()
SMELLS = "sweet fresh warm spicy wonderful buttery".split()

OPENINGS = [
    "[Once upon a time|Once|Long ago|One {weather} {time}|A long time ago], there was {a size} {kind} named {hero}. "
    "{hero} lived [near|close to|not far from|right beside] the {home} with {his} {family}.",
    "[Once upon a time|One {weather} {time}|On a {weather} {day}], there was {a trait} {kind} [named|called] {hero}. "
    "{He} [lived|had a cozy home] [by|near|next to] the {home}.",
    "{hero} was {a trait} {size} {kind}. [Every {day}|Every {time}|On most days], {he} [went|walked|ran] to the {home} "
    "[to play {game}|to look for {a fruit}|with {his} {family}|to sing {song}].",
    "There once was {a size} {kind} whose name was {hero}. {hero} was {trait}, and {he} loved [{food}|to play "
    "{game}|the {home}] more than anything.",
    "In a [small|quiet|pretty|busy|faraway] place near the {home} lived {a trait} {kind} named {hero}. {His} best "
    "friend was {a friendkind} named {friend}.",
]
CLOSINGS = [
    "", "", "", "[And they|They all] lived happily ever after.",
    "From that day on, {hero} and {friend} were [the best of friends|never far apart|always kind to each other].",
    "That night {hero} [fell asleep with a smile|dreamed of the {home}|told {elder} all about it|slept very well].",
    "{hero} [never forgot|always remembered|often thought about] that {day}.",
    "And that is how {hero} learned [something important|a good lesson] that {day}.",
]

# A plot: its beginning, its problem, its end.
PLOTS = [
    # lost and found
    ("{hero} had {a color} {toy}. It was {his} favorite toy, and {he} took it [everywhere|to bed|to the {place}] "
     "every day.",
     "One {time}, {hero} could not find the {color} {toy}. {He} looked [in every room|all over the house|here and "
     "there], but it was gone. \"Where is my {toy}?\" [cried|asked] {hero}. {friend} heard {him} and said, \"[Do "
     "not worry|Do not cry]. We will look for it together.\"",
     "They searched and searched. At last {friend} looked {hiding}, and there was the {color} {toy}! \"[You found "
     "it|Here it is]!\" shouted {hero}. {He} hugged {friend} and said, \"Thank you for helping me.\" Then they "
     "played with the {toy} together until it was dark."),
    # sharing
    ("{friend} came to visit {hero} at the {place}. {hero} had brought {a color} {toy}. \"May I play with your "
     "{toy}?\" asked {friend}.",
     "\"No,\" said {hero}. \"It is mine!\" {friend} [felt sad|looked at the ground|was hurt] and walked away. "
     "{hero} played with the {color} {toy} alone, but soon it was [not fun anymore|boring|very quiet]. {elder} saw "
     "{him} and said, \"Toys are more fun when you share them.\"",
     "{hero} thought about it. {He} ran after {friend} and said, \"I am sorry. Let us play with the {toy} "
     "together.\" {friend} smiled. They took turns with the {color} {toy} all {time}. Sharing made both of them "
     "happy."),
    # broken thing, truth told
    ("{elder} had {a color} [vase|bowl|cup|teapot|plate|mirror] that was very old. \"Please be careful near it,\" "
     "{elder} told {hero}.",
     "But {hero} played {game} inside the house, and something fell down with a crash. It was in [{number}|many] "
     "pieces! {hero} was scared. {He} [wanted to hide|thought of blaming the cat|put the pieces {hiding}]. \"Who "
     "broke it?\" asked {elder}.",
     "{hero} took a deep breath. \"I did it,\" {he} said. \"I am very sorry.\" {elder} was quiet for a moment, and "
     "then {ehe} smiled. \"Thank you for telling the truth,\" said {elder}. Together they [glued the pieces|swept "
     "the floor|fixed it with care]. {hero} learned that being honest is better than hiding."),
    # afraid of the dark
    ("Every night, {elder} put {hero} to bed with {a color} blanket and read [a story|a book about {animals}|two "
     "stories].",
     "But when the light went out, {hero} was afraid. {He} saw a dark shape near the window. \"There is a monster "
     "in my room!\" {he} cried. {elder} came running. \"Let us look at this monster,\" said {elder}, and {ehe} "
     "turned on the lamp.",
     "It was only {his} {color2} {wear} hanging on a hook! {hero} laughed. \"The dark is just the same room with "
     "the light off,\" said {elder}. After that, {hero} was not afraid. {He} said good night to the {wear} and "
     "slept until the sun rose."),
    # kite in tree
    ("On a windy {day}, {hero} and {friend} took {a color} kite to the {place}. The kite flew high, almost as high "
     "as the clouds.",
     "Then a strong wind blew, and the string broke. The kite landed in a tall tree. \"Oh no!\" said {hero}. {He} "
     "jumped, but the branch was too high. {friend} [threw a stick|shook the tree|tried to climb], but the kite did "
     "not move.",
     "{friend} had an idea. \"Let us ask the {worker},\" {fhe} said. \"The {worker} has a long ladder.\" The "
     "{worker} came and climbed up. Soon the {color} kite was in {hero}'s hands. \"Thank you!\" they both said. "
     "They gave the {worker} {some food} and flew the kite again, far from any tree."),
    # hurt animal
    ("{hero} was walking through the {place} when {he} heard a small sound. It was {a critter} {hiding}.",
     "\"I am hurt and I cannot go home,\" said the {critter}. {hero} wanted to help, but {he} did not know what to "
     "do. {He} [made a soft bed of leaves|picked it up gently|gave it some water] and carried the {critter} to "
     "{elder}.",
     "{elder} knew what to do. They cared for the {critter} for {number} days. At last it was well again. \"You "
     "saved me,\" said the {critter}. \"I will never forget you.\" {hero} let it go at the {place}. Every {day} "
     "after that, the {critter} came back to say hello."),
    # learning a skill
    ("{hero} wanted to learn to {skill}. {friend} could already {skill}, and it looked [easy|like so much "
     "fun|wonderful].",
     "{hero} tried, but {he} [fell down|could not do it|made a mess|got it all wrong]. {He} tried again and it went "
     "wrong again. \"I will never learn to {skill}!\" said {hero}, and {he} [sat down and cried|stamped {his} "
     "foot|wanted to give up].",
     "{friend} sat beside {him}. \"I fell {number} times before I could do it,\" said {friend}. \"Just try a little "
     "every day.\" So {hero} practiced every {time}. After {number2} days, {he} could {skill}! \"Look at me!\" {he} "
     "shouted. {friend} clapped, and {hero} felt very proud."),
    # stolen pie
    ("The {worker} had made {food} and put it on the window to cool. The {smell} smell floated over the {place}.",
     "When the {worker} came back, [half of it|all of it|most of it] was gone! \"Who ate my {food}?\" asked the "
     "{worker}. Everybody looked at {hero}, because {he} had crumbs on {his} {color} {wear}. {hero}'s face turned "
     "red.",
     "\"It was me,\" said {hero}. \"It smelled so good. I am sorry.\" The {worker} said, \"Then you must help me "
     "make more.\" So {hero} washed {his} hands and helped all {time}. When the new {food} was ready, the {worker} "
     "gave {him} a big piece. It tasted even better, because {hero} had worked for it."),
    # race
    ("There was a big race at the {place} on {day}. {hero} and {friend} both wanted to win {a color} medal.",
     "They ran very fast. {hero} was in front when {he} heard a cry. {friend} had [tripped over a root|fallen into "
     "a puddle|hurt {fhis} foot on a stone]. {hero} could see the end of the race. {He} had to choose.",
     "{hero} turned around and ran back. \"Take my hand,\" {he} said. They walked to the end together, and they "
     "came in last. But the {worker}, who was the judge, said, \"A good friend is worth more than a race.\" The "
     "{worker} gave the {color} medal to {hero}, and {hero} shared it with {friend}."),
    # garden
    ("{hero} planted {crops} in the garden with {elder}. {He} watered them every {time} with {a color} can.",
     "For many days nothing grew. \"My {crops} are broken,\" said {hero}. \"They do not want to grow.\" {He} wanted "
     "to [dig them up|throw the can away|stop]. {elder} said, \"Be patient. Good things need time.\"",
     "So {hero} waited. {He} gave them water and [sang {song} to them|pulled out the weeds|chased the birds away]. "
     "One {weather} {time}, {he} saw a little green leaf. \"They are growing!\" {he} shouted. Soon the garden was "
     "full of {crops}, and {hero} gave [the best ones|a basket of them|some] to {friend}."),
    # lost in the woods
    ("{hero} went to the {place} to look for {a fruit}. {elder} said, \"Do not go too far.\" {hero} promised.",
     "But {hero} saw {a color} butterfly and followed it. {He} ran left and right, and soon {he} did not know the "
     "way home. It was getting dark. \"I am lost,\" {he} whispered. Then {he} saw {a critter} sitting on a stone.",
     "\"Please, which way is my home?\" asked {hero}. \"Follow the [stream|path of white stones|smell of "
     "{food}|sound of the bells],\" said the {critter}. {hero} did, and soon {he} saw {elder} with a lamp. {elder} "
     "hugged {him} tight. \"I should have listened,\" said {hero}. After that {he} always stayed close."),
    # birthday surprise
    ("It was {friend}'s birthday. {hero} wanted to give {fhim} something special. {He} [made|painted|saved {his} "
     "coins for|found] {a color} {treasure} and put it in a box.",
     "On the way to the party, {hero} slipped and the box fell into the {water}. It floated away! {hero} had no "
     "present now. {He} came to the party with empty hands and a sad face. \"What is wrong?\" asked {friend}.",
     "{hero} told {fhim} about the {color} {treasure}. {friend} smiled and said, \"The best present is that you "
     "came.\" Then they heard a knock. It was the {worker}, all wet, with the box! \"I found this in the {water},\" "
     "said the {worker}. {friend} opened it and loved the {treasure}. They all ate {food} together."),
    # storm
    ("{hero} and {friend} were playing {game} at the {place} when the sky turned dark. Thunder went boom, and rain "
     "began to fall.",
     "\"I am scared of thunder,\" said {friend}, and {fhe} began to shake. The path home was too wet and slippery. "
     "{hero} was scared too, but {he} did not want to show it. {He} looked around for a dry place.",
     "{hero} found a [hollow tree|little shed|dry cave|big rock with a roof]. They sat inside under {hero}'s "
     "{color} {wear}. \"Let us count after each flash,\" said {hero}. They counted and [sang {song}|told jokes|ate "
     "{food}], and soon the storm was over. A rainbow came out. \"You made me feel safe,\" said {friend}."),
    # new kid
    ("A new {friendkind} named {friend} came to the {home}. {friend} did not know anyone and sat alone under a tree "
     "with {a color} {toy}.",
     "The others played {game} and did not see {fhim}. {hero} wanted to say hello, but {he} was shy. \"What if "
     "{fhe} does not like me?\" {hero} asked {elder}. \"Everyone is a little afraid at first,\" said {elder}. "
     "\"Somebody has to be brave.\"",
     "So {hero} walked over and said, \"Hello. I like your {toy}.\" {friend} looked up and smiled. \"Would you like "
     "to play with me?\" {fhe} asked. They played with the {color} {toy} until the sun went down. Now neither of "
     "them was alone."),
    # lie about wolf
    ("{hero} had to watch the sheep on the hill near the {place}. It was boring, so {he} called, \"Help! A wolf!\" "
     "Everybody came running, even the {worker}. {hero} laughed. There was no wolf.",
     "The next {time} {he} did it again, and again they all came. \"That is not funny,\" said {friend}. On {day}, a "
     "real wolf came out of the trees! \"Help! A wolf!\" cried {hero}. But this time nobody came.",
     "Only {friend} came back. {fHe} [banged on a pot|rang a bell|lit a torch] and made so much noise that the wolf "
     "ran away. \"I am sorry,\" said {hero}. \"I will not lie again.\" The {worker} heard it and said, \"Now I can "
     "trust you.\" And {hero} kept {his} word."),
    # magic wish
    ("One {time}, {hero} found {a color} {treasure} {hiding}. When {he} rubbed it, a tiny voice said, \"You may "
     "have one wish.\"",
     "{hero} thought of [a mountain of {food}|a room full of toys|a castle of {his} own]. But then {he} saw "
     "{friend}, who was sick in bed and could not come out to play. {friend} looked [pale and tired|very sad|so "
     "lonely]. {hero} did not know what to wish for.",
     "At last {hero} held the {treasure} and said, \"I wish that {friend} is well again.\" There was a flash of "
     "{color} light. {friend} jumped out of bed and danced! \"Your wish was a kind one,\" said the tiny voice, and "
     "the {treasure} [turned to dust|was only {a treasure} again|flew away]. {hero} did not mind. {He} had {his} "
     "friend back."),
    # lonely dragon
    ("Everybody at the {home} was afraid of the dragon who lived near the {place}. It was big and {color}, and "
     "smoke came out of its nose.",
     "One {time}, {hero} heard the dragon cry. \"Why are you sad?\" {he} asked from behind a rock. \"Nobody will "
     "play {game} with me,\" said the dragon. \"When I laugh, fire comes out, and they all run away.\" {hero} was "
     "still a bit afraid.",
     "But {hero} was {trait} too. \"I know what to do,\" {he} said. \"You can [warm the soup|light the lamps|bake "
     "the bread|melt the snow] for us!\" The dragon tried it with a small puff of fire. Everyone cheered. After "
     "that, the {color} dragon had many friends, and {hero} was the first."),
    # robot
    ("{hero} had a robot named Beep. Beep was {color} and could [sweep the floor|carry heavy bags|sing {song}|count "
     "stars]. Beep and {hero} did everything together.",
     "One {day}, Beep stopped. Its lights went out and it did not move. \"Beep, wake up!\" said {hero}. {He} pushed "
     "every button, but nothing happened. {hero} carried Beep to the {worker} near the {place}.",
     "The {worker} opened the {color} robot and found {a treasure} inside. \"This was stuck in the wheels,\" said "
     "the {worker}. \"Now try again.\" {hero} pushed the button, and the lights came on. \"Hello, {hero},\" said "
     "Beep. \"I missed you.\" {hero} laughed and took Beep home."),
    # train late
    ("{hero} and {elder} were at the station. They wanted to visit {friend}, who lived far away near the {place}. "
     "{hero} held {a color} {toy} to give to {friend}.",
     "They waited and waited, but the train did not come. \"There is a cow on the tracks,\" said the man at the "
     "station. \"It will not move.\" \"We will be late!\" cried {hero}. Then {he} remembered the {fruit} in {his} "
     "bag.",
     "{hero} walked slowly to the cow and held out the {fruit}. The cow smelled it and followed {him} off the "
     "tracks. \"Hooray!\" shouted all the people. The train came at last. When {friend} saw the {color} {toy}, "
     "{fhe} was very happy, and {hero} told {fhim} about the hungry cow."),
    # messy room
    ("{hero}'s room was always a mess. There were toys on the floor and [socks|books|crumbs] on the bed. \"Please "
     "clean your room,\" said {elder}. \"Later,\" said {hero}.",
     "Then {friend} came to play {game}. {hero} wanted to show {fhim} {his} {color} {toy}, but {he} could not find "
     "it in the mess. {friend} stepped on {a tool} and hurt {fhis} foot. \"Ouch!\" said {friend}. {hero} felt bad.",
     "\"I will clean up now,\" said {hero}. {friend} helped. They put [the books on the shelf|every toy in its "
     "box|the clothes away]. Under the last {wear} they found the {color} {toy}! The room looked big and bright. "
     "\"Now there is space to play,\" said {hero}, and {elder} brought them {food}."),
    # borrowed
    ("{friend} let {hero} borrow {a color} {tool}. \"Please bring it back on {day},\" said {friend}. {hero} "
     "promised.",
     "{hero} used it at the {place} and left it outside in the rain. When {he} came back, the {tool} was "
     "[rusty|dirty|cracked|full of mud]. \"What will {friend} say?\" {he} thought. {He} wanted to keep away from "
     "{friend}.",
     "{elder} said, \"You made a promise.\" So {hero} worked hard to [clean it|fix it|mend it], and {he} saved "
     "{his} coins and bought {a color2} ribbon to go with it. On {day} {he} gave it back. \"I was careless, and I "
     "am sorry,\" said {hero}. {friend} looked at the {tool} and said, \"It is better than before. You kept your "
     "promise.\""),
    # sandcastle
    ("{hero} built a big sandcastle at the beach. It had {number} towers, a gate, and {a color} flag on top.",
     "{friend} ran by with {fhis} {toy} and did not look. {fHe} [fell onto|ran into|stepped on] the castle, and the "
     "towers broke. \"You ruined it!\" yelled {hero}. {friend} began to cry. \"I did not mean to,\" {fhe} said.",
     "{hero} was angry, but then {he} saw the tears. \"It was an accident,\" {he} said. \"Will you help me build it "
     "again?\" {friend} nodded. Together they made a castle with {number2} towers, and they put the {color} flag on "
     "the tallest one. It was even better than the first."),
    # lost tooth
    ("{hero} had a loose tooth. {He} wiggled it all {time} while {he} ate {food}.",
     "On {day} the tooth fell out, and it rolled away! {hero} looked {hiding}, but {he} could not find it. \"Now "
     "the tooth fairy will not come,\" {he} said sadly. {friend} said, \"Let us think. Where were you sitting?\"",
     "They went back to the place. {friend} saw something small and white in the {color} {wear} of {elder}. It was "
     "the tooth! That night {hero} put it under {his} pillow. In the morning there was a shiny {treasure}. {hero} "
     "showed it to {friend} and said, \"Half of this luck is yours.\""),
    # first day of school
    ("It was {hero}'s first day at school. {He} wore {a color} {wear} and held {elder}'s hand very tight.",
     "\"What if nobody talks to me?\" asked {hero}. At school it was loud and there were many children. {hero} hid "
     "behind the door. Then somebody else came behind the door too. It was {a friendkind} named {friend}, and {fhe} "
     "was shaking.",
     "\"Are you scared too?\" asked {hero}. {friend} nodded. \"Then let us be scared together,\" said {hero}. They "
     "held hands and went in. The teacher let them draw {shape} and [sing {song}|eat {food}|play {game}]. When "
     "{elder} came back, {hero} said, \"Can I go again tomorrow?\""),
    # letter in a bottle
    ("At the beach {hero} found a bottle with a letter in it. It said, \"I live on the other side of the water. I "
     "have no one to play {game} with. Please write to me. Your friend, {friend}.\"",
     "{hero} wanted to answer, but the sea was very big. \"How can my letter get there?\" {he} asked {elder}. They "
     "put a letter and {a color} {treasure} into the bottle and threw it into the waves. For {number} weeks nothing "
     "came back. {hero} was sad.",
     "Then on {day} a small boat came to the shore. In it sat {a friendkind} holding the {color} {treasure}. \"I am "
     "{friend},\" {fhe} said. \"I got your letter, and I wanted to meet you.\" {hero} jumped for joy. They played "
     "{game} all {time}, and then they ate {food}."),
    # cold creature gets clothes
    ("Winter came to the {place}. Snow covered everything. {hero} was warm in {his} {color} {wear}, which {elder} "
     "had made.",
     "On the way home {he} saw {a critter} in the snow. It was shivering. \"I am so cold,\" it said. \"I have no "
     "home and no blanket.\" {hero} looked at {his} {wear}. {He} loved it very much.",
     "{hero} took off the {color} {wear} and put it around the {critter}. Then {he} ran home as fast as {he} could. "
     "{elder} gave {him} hot {drink} and said, \"I am proud of you.\" The next day there was a new {wear} on {his} "
     "bed. And the {critter} slept warm all winter."),
    # too greedy
    ("{hero} found a tree full of {fruits} near the {place}. \"These are all mine,\" {he} said, and {he} began to "
     "eat.",
     "{friend} came by. \"May I have one?\" {fhe} asked. \"No!\" said {hero} with a full mouth. {He} ate {number} "
     "more, and then {number2} more. Then {his} tummy began to hurt. \"Ow, ow!\" {he} cried, and {he} had to lie "
     "down.",
     "{friend} was not angry. {fHe} brought {him} some warm {drink} and sat with {him}. \"Why are you kind to me?\" "
     "asked {hero}. \"Because you need a friend,\" said {friend}. The next day {hero} filled {a color} basket with "
     "{fruits} and gave it all to {friend}."),
    # sick friend
    ("{hero} and {friend} met at the {place} every {day}. But this {day}, {friend} did not come.",
     "{hero} went to {friend}'s house. {friend} was in bed with a red nose. \"I am sick,\" {fhe} said. \"I cannot "
     "go to the {place}, and I am so bored.\" {hero} thought hard. How could {he} bring the {place} to {friend}?",
     "{hero} ran out. {He} came back with {a color} leaf, a smooth stone, and {a critter} in a jar. {He} drew "
     "[trees and hills|the whole {place}|{shape}] on a big paper and put it on the wall. \"Now the {place} is "
     "here,\" said {hero}. {friend} laughed, and in {number} days {fhe} was well."),
    # music contest
    ("There was a music show at the {home}. {hero} wanted to play {song} on {his} {color} {instrument}.",
     "When {hero} stood in front of everyone, {his} hands shook, and {he} forgot the song. Somebody laughed. {hero} "
     "wanted to run away. Then {he} saw {friend} in the front row. {friend} began to hum {song} very softly.",
     "{hero} closed {his} eyes and listened. The song came back to {him}. {He} played and played, and soon everyone "
     "clapped along. \"How did you do it?\" asked {elder}. \"I had a friend who helped me remember,\" said {hero}, "
     "and {he} gave {friend} a bow."),
    # treasure map
    ("{hero} found an old map {hiding}. It had {a color} cross near the {place}. \"A treasure!\" said {hero}, and "
     "{he} showed it to {friend}.",
     "They walked for a long time. They [crossed a bridge|climbed a hill|went through a dark tunnel] and dug a deep "
     "hole with {a tool}. At last they found a box, but it was locked. \"We have no key,\" said {friend}. They were "
     "tired and hungry.",
     "{hero} turned the map over. A small {color2} key was stuck to the back! {He} opened the box. There was no "
     "gold in it. There was {a treasure}, and a note that said, \"The walk with a friend was the treasure.\" {hero} "
     "and {friend} looked at each other and laughed all the way home."),
    # stuck wheel
    ("The {worker} was going to the market with a cart full of {crops}. {hero} and {friend} waved at the {worker}.",
     "Suddenly the wheel got stuck in the mud. The {worker} pushed and pulled, but the cart did not move. \"If I am "
     "late, nobody will buy my {crops},\" said the {worker}. {hero} pushed too, but {he} was too small alone.",
     "\"We need everyone,\" said {friend}. {fHe} called {fhis} neighbors, and {hero} called {elder}. They put {a "
     "tool} under the wheel. \"One, two, three!\" shouted {hero}. The cart rolled out of the mud. The {worker} "
     "thanked them and gave each of them [a bag of {crops}|{a fruit}|a ride to the market]."),
    # jealous
    ("{friend} got {a color} {toy} for {fhis} birthday. It was new and shiny. {hero}'s own {toy} was old.",
     "{hero} was jealous. \"It is not fair,\" {he} said. {He} hid the new {toy} {hiding}. When {friend} came back, "
     "{fhe} looked for it and began to cry. {hero}'s tummy felt funny. It was not a good feeling.",
     "{hero} went and got the {toy}. \"I took it because I wanted one too,\" {he} said. \"I am sorry.\" {friend} "
     "wiped {fhis} eyes. \"You could have just asked me,\" {fhe} said. Then {friend} let {hero} play with the "
     "{color} {toy}, and {hero} let {friend} play with the old one. It turned out that {friend} liked the old one "
     "best."),
    # bridge
    ("{hero} wanted to visit {friend}, who lived on the other side of the {water}. The two friends had made {food} "
     "together every {day}.",
     "But after the big rain, the bridge was gone. {hero} stood on one side and {friend} on the other. \"How will I "
     "get to you?\" called {hero}. \"I do not know!\" called {friend}. They were both sad.",
     "Then a beaver swam by. \"I can build, but I need wood,\" said the beaver. {hero} carried sticks, and {friend} "
     "carried {color} stones. They worked for {number} days. At last there was a new bridge, and {hero} ran across. "
     "They [hugged|danced] in the middle, and they gave the beaver a big plate of {food}."),
    # spider
    ("There was a spider in {hero}'s room. It was small and had {a color} spot. \"Go away!\" said {hero}. {He} was "
     "afraid of spiders.",
     "{hero} took {a tool} to chase it out. \"Please wait,\" said the spider. \"I only eat the flies that bite you "
     "at night.\" {hero} did not believe it. {He} put the spider outside. That night the flies came, and {hero} got "
     "{number} bites.",
     "In the morning {hero} went to look for the spider. It was sitting sadly {hiding}. \"I was wrong about you,\" "
     "said {hero}. \"Please come back.\" The spider made a beautiful web in the corner that looked like {shape}. "
     "And {hero} never had a bite again."),
    # moon
    ("{hero} looked out of the window every night and said good night to the moon. The moon was round and bright "
     "over the {place}.",
     "But each night the moon got smaller. \"Somebody is eating the moon!\" cried {hero}. {He} told {friend}, and "
     "{friend} was worried too. They put {food} outside so that nobody would be hungry for the moon. But still it "
     "got smaller, until it was gone.",
     "{hero} cried. {elder} took {a color} ball and a lamp. \"Look,\" said {elder}. \"The moon is still there. We "
     "only see the part that the sun shines on.\" {hero} watched. {Number} nights later there was a thin silver "
     "line in the sky. \"Welcome back, moon!\" called {hero} and {friend}."),
    # the wrong bag
    ("{hero} and {elder} went to the market near the {place}. {hero} carried {a color} bag with {fruits} in it.",
     "At home {hero} opened the bag, but there were no {fruits}. There was {a treasure} that looked very old! "
     "\"This is not our bag,\" said {hero}. \"We could keep it,\" said {friend}, who had come to visit. {hero} "
     "thought about it for a while.",
     "\"Somebody must be sad without it,\" said {hero}. They went back and asked everyone. The {worker} was sitting "
     "on a bench with the other {color} bag. \"My {treasure}!\" said the {worker}. \"My mother gave it to me. How "
     "can I thank you?\" The {worker} gave them {food}, and {hero} felt warm inside."),
    # giant sneeze
    ("A giant lived on the hill above the {home}. He was as tall as {number} houses, but he was very gentle. {hero} "
     "was his friend.",
     "One {day} the giant caught a cold. \"Ah, ah, achoo!\" he sneezed. The roofs flew off, and {hero}'s {color} "
     "{wear} blew away. \"Make him stop!\" cried the people. \"He must leave!\" said the {worker}. The giant began "
     "to weep, and the street was wet.",
     "{hero} had an idea. \"He only needs a blanket,\" {he} said. Everyone brought one, and {friend} sewed them "
     "together. They gave the giant a bathtub full of {drink}. The next day he was well. He put back every roof, "
     "and he gave {hero} {his} {color} {wear}. Nobody asked him to leave again."),
    # the puppy choice
    ("{hero} wanted a puppy more than anything. \"A puppy is a lot of work,\" said {elder}. \"You must feed it and "
     "walk it every day.\"",
     "To show that {he} could do it, {hero} took care of {a color} {toy} as if it were a puppy. {He} walked it in "
     "the rain and {he} gave it pretend food. {friend} laughed at {him}. \"That is silly,\" said {friend}. {hero} "
     "was hurt, but {he} did not stop for {number} weeks.",
     "On {day} {elder} came home with a box. Something inside said, \"Woof!\" \"You have shown me that you are "
     "ready,\" said {elder}. It was {a color2} puppy! {hero} named it {petname}. {friend} came and said, \"I am "
     "sorry that I laughed.\" \"That is all right,\" said {hero}. \"Would you like to walk {petname} with me?\""),
    # shadow / echo
    ("{hero} went to the canyon for the first time. \"Hello!\" {he} called. \"Hello!\" said a voice from far away.",
     "\"Who are you?\" shouted {hero}. \"Who are you?\" shouted the voice. {hero} became angry. \"Stop that! You "
     "are mean!\" {he} yelled. \"You are mean!\" yelled the voice. {hero} ran to {elder} and said, \"There is a "
     "rude {kind} over there.\"",
     "{elder} smiled. \"Go back and say something kind,\" said {elder}. So {hero} called, \"I like you!\" And the "
     "voice said, \"I like you!\" \"It is an echo,\" said {elder}. \"What you send out comes back to you.\" {hero} "
     "thought of {friend}, and the next {day} {he} gave {friend} {a color} {treasure}. {friend} gave {him} a hug."),
    # cake gone wrong
    ("{hero} wanted to make {food} for {elder}. \"I can do it all alone,\" {he} told {friend}. {He} put on {a "
     "color} apron.",
     "{He} did not read the recipe. {He} put in {number} spoons of salt, because {he} thought it was sugar. When "
     "{friend} tasted it, {fhe} made a funny face. \"It tastes like the sea!\" said {friend}. {hero} was close to "
     "tears.",
     "\"Let us try again, and I will read to you,\" said {friend}. {friend} read each step, and {hero} mixed. This "
     "time the {smell} smell filled the whole house. {elder} took a bite and said, \"This is the best {food} I ever "
     "had.\" \"We made it together,\" said {hero}."),
    # boat adventure
    ("{hero} and {friend} made a boat from {a material} and called it the {color2} {boatname}. They sailed it on "
     "the {water}.",
     "In the middle of the {water} the boat began to leak. \"Water is coming in!\" cried {friend}. {hero} looked "
     "for something to stop the hole. There was only {his} {color} {wear}. It was {his} favorite, a gift from "
     "{elder}.",
     "{hero} pushed the {wear} into the hole, and the water stopped. {friend} rowed as fast as {fhe} could until "
     "they reached the shore. \"Your {wear} is ruined,\" said {friend}. \"But we are safe,\" said {hero}. The next "
     "{day} {friend} brought {him} a new {color} {wear}, and they fixed the boat."),
    # the seed that was a promise / caring for pet
    ("{friend} had to go away for {number} days. \"Will you take care of my {critter}?\" {fhe} asked. \"Its name is "
     "{petname}.\" \"I promise,\" said {hero}.",
     "The first day {hero} fed {petname} and played with it. But on {day} {he} went to the {place} and forgot to "
     "close the lid. When {he} came home, {petname} was gone! {hero}'s heart beat fast. {He} called, \"{petname}! "
     "{petname}!\" There was no answer.",
     "{hero} put down a trail of {fruit} pieces, and then {he} waited very quietly. After a long time, {petname} "
     "came out from {hidden}. {hero} closed the lid and did not leave again. When {friend} came back, {hero} told "
     "{fhim} the whole story. \"Thank you for not giving up,\" said {friend}."),
    # king's crown
    ("The [king|queen] of the {home} had a crown with {a color} stone. One {time} the stone was missing! \"Who can "
     "find it?\" asked the guards.",
     "Everybody looked for a thief. They said it was the poor {worker}, because the {worker} had been in the "
     "castle. \"It was not me!\" said the {worker}. {hero} believed the {worker}. {He} looked at the floor and saw "
     "small tracks that led outside.",
     "{hero} and {friend} followed the tracks to the {place}. There, {hiding}, sat a magpie with the {color} stone. "
     "\"I like shiny things,\" said the bird. {hero} gave it {a treasure} instead. The stone went back into the "
     "crown, the {worker} was free, and everyone said sorry to the {worker}. The guards gave {hero} {some food}."),
    # snowman
    ("Snow fell all night. In the morning {hero} and {friend} made a snowman. They gave him {a color} {wear} and a "
     "carrot nose.",
     "Then {friend} wanted the snowman to look left, and {hero} wanted him to look right. They [shouted|pulled and "
     "pushed], and the head fell off. \"It is your fault!\" said {hero}. \"No, it is yours!\" said {friend}. They "
     "both went home angry.",
     "At home {hero} looked out of the window at the snowman without a head. {He} missed {friend}. {He} went out, "
     "and {friend} was already there. \"I am sorry,\" they said at the same time, and they laughed. They made "
     "{number} small snowmen around the big one, so that there was one for every side. The one with the {color} "
     "{wear} was the biggest."),
    # the lighthouse
    ("{hero} lived in the lighthouse with {elder}. Every night {elder} lit the big lamp so that ships could find "
     "the {water}.",
     "One stormy {day} {elder} was away, and the lamp went out. {hero} heard a ship's horn in the dark. It was the "
     "boat of {friend}'s {family}! \"They will hit the rocks!\" said {hero}. The stairs were dark, and there were "
     "{number} times ten of them.",
     "{hero} took {a color} lantern and climbed up, step by step. {His} hands shook, but {he} lit the big lamp. The "
     "light went over the sea, and the ship turned just in time. In the morning {friend} came running. \"You saved "
     "us!\" {fhe} said. {elder} hung the {color} lantern over {hero}'s bed, and it hangs there still."),
    # the slow one
    ("{hero} was the slowest at the {place}. When the others ran, {he} walked. \"Hurry up!\" they called. Only "
     "{friend} waited for {him}.",
     "One {time} they all ran to see the {color} [balloon|tent|wagon] at the fair. They ran so fast that nobody saw "
     "{a critter} in the road with a hurt leg. But {hero} saw it, because {he} was slow. \"Stop!\" {he} called. "
     "\"Somebody needs help.\"",
     "{hero} and {friend} carried the {critter} to the doctor. \"You came just in time,\" said the doctor. The "
     "others heard about it and felt ashamed. \"You see things that we miss,\" they said. After that they sometimes "
     "walked slowly with {hero}, and they saw [flowers|nests|snails|clouds like ships] that they had never seen "
     "before."),
    # the noise
    ("{hero} could not sleep. From outside came a strange noise. It went {noise}, {noise}, {noise}.",
     "\"Is it a ghost?\" thought {hero}. {He} woke up {friend}, who was staying for the night. \"I do not hear "
     "it,\" said {friend}. Then it came again: {noise}, {noise}. They held hands and went to look with {a color} "
     "lamp. Their knees were shaking.",
     "The noise came from the kitchen. {hero} opened the door slowly. There was {a critter}, stuck in the {tool}! "
     "\"Please let me out,\" it said. \"I only wanted a bit of {food}.\" {hero} let it out, and {friend} gave it "
     "some. Then they all laughed, and after that the night was quiet."),
    # the picture
    ("{hero} painted a picture of {shape} for the show at the {home}. {He} used {color} and {color2} paint and "
     "worked on it for {number} days.",
     "The night before the show, the cat walked over the wet picture. There were paw prints all over it! \"It is "
     "ruined,\" cried {hero}. \"There is no time to make a new one.\" {friend} looked at it from one side and then "
     "from the other.",
     "\"Look,\" said {friend}. \"The paw prints are like [stars|flowers|little clouds|leaves].\" {hero} dried {his} "
     "eyes and painted thin {color} lines around them. At the show everyone stopped in front of it. The {worker} "
     "gave it the first prize. \"Half of it was made by the cat,\" said {hero}, and {he} gave the cat some fish."),
    # tall tale of thirst / well
    ("It had not rained for {number} weeks. The {crops} at the {place} were dry, and the animals were thirsty. "
     "{hero} carried water in {a color} bucket every {time}.",
     "Then the well was empty too. \"What shall we do?\" asked {friend}. Everybody was afraid. {hero} remembered a "
     "story of {elder}'s about a spring under the old stone on the hill. \"That is just a story,\" said the "
     "{worker}. Nobody wanted to dig.",
     "{hero} went alone with {a tool}. {He} dug until {his} arms hurt. Then {friend} came to help, and then the "
     "{worker}. Suddenly cool water jumped out of the ground! They all drank and laughed. {elder} said, \"Old "
     "stories sometimes know more than we do.\" And the {crops} grew green again."),
]

INSTRUMENTS = "flute violin drum trumpet guitar harp piano banjo horn fiddle harmonica".split()
DRINKS = "milk, tea, cocoa, soup, apple juice, honey milk".split(", ")
WATERS = "river lake pond stream bay".split()
PETNAMES = ("Biscuit Pepper Button Muffin Patch Cookie Pickle Sunny Shadow Waffle Bubbles Snowy Peanut Rusty Dot Fuzzy "
            "Speedy Noodle Pebble Jelly").split()
MATERIALS = "old~door wooden~box big~barrel bathtub hollow~log large~basket".split()
BOATNAMES = "Whale Star Arrow Duck Wave Wind Pirate Comet Swallow Pearl".split()
NOISES = "tap scratch knock squeak bump creak rustle clink plop".split()
FAMILIES = ("family, mom and dad, grandma, big sister, little brother, two brothers, mother, father, grandparents, "
            "three sisters, uncle, old aunt").split(", ")
LISTS = {
    "size": SIZES, "trait": TRAITS, "color": COLORS, "color2": COLORS, "toy": TOYS, "wear": WEARS,
    "treasure": TREASURES, "tool": TOOLS, "food": FOODS, "fruit": FRUITS, "crops": CROPS, "place": PLACES,
    "home": PLACES, "hiding": HIDING, "weather": WEATHER, "time": TIMES, "day": DAYS, "song": SONGS, "game": GAMES,
    "skill": SKILLS, "shape": SHAPES, "number": NUMBERS, "number2": NUMBERS, "smell": SMELLS, "critter": CRITTERS,
    "worker": WORKERS, "drink": DRINKS, "instrument": INSTRUMENTS, "water": WATERS, "petname": PETNAMES,
    "material": MATERIALS, "boatname": BOATNAMES, "noise": NOISES, "family": FAMILIES,
}

def compile_template(template):
    """Parse a template into a list of texts, slots (as 1-tuples) and choices (as lists of such lists)."""
    tokens = iter(re.findall(r"\{[^}]+\}|[\[\]|]|[^\[\]|{]+", template))

    def sequence():
        options = [[]]
        for token in tokens:
            if token == "|":
                options.append([])
            elif token == "]":
                break
            else:
                options[-1].append(sequence() if token == "[" else (token[1:-1],) if token[0] == "{" else token)
        return options

    return sequence()[0]

def expand(parts, cast, rng, out):
    """Append the text of a compiled template to `out`, drawing choices and filling slots from the cast."""
    for part in parts:
        if type(part) is str:
            out.append(part)
        elif type(part) is list:
            expand(part[int(rng.random() * len(part))], cast, rng, out)
        else:
            out.append(cast[part[0]])

def mentions(parts, slot):
    """Whether a compiled template holds a slot outside its choices."""
    return (slot,) in parts

OPENINGS, CLOSINGS = [list(map(compile_template, templates)) for templates in (OPENINGS, CLOSINGS)]
PLOTS = [tuple(map(compile_template, plot)) for plot in PLOTS]
SLOTS_WITH_ARTICLE = ("size", "trait", "color", "color2", "treasure", "tool", "fruit", "critter", "material",
                      "friendkind")
OTHER_PLURALS = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "calf": "calves"} | {
    noun: noun for noun in ("deer", "moose", "bison")}
PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}

def plural(noun):
    """More than one of an animal or a fruit."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return OTHER_PLURALS.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")

def draw_cast(rng):
    """Who and what a story is about: the text of every slot."""
    # A few words are frequent and most are rare, as in natural text: the first of n is drawn with probability n^(-1/3).
    pick = lambda words: words[int(rng.random() ** 3 * len(words))].replace("~", " ")
    pick_name = lambda names: names[int(rng.random() ** 5 * len(names))]  # more so: half the children are Lily or Tom
    cast = {slot: pick(words) for slot, words in LISTS.items()}
    for slot, other in (("color2", "color"), ("number2", "number"), ("home", "place")):
        while cast[slot] == cast[other]:
            cast[slot] = pick(LISTS[slot])
    for role, kind, prefix in (("hero", "kind", ""), ("friend", "friendkind", "f")):
        gender = rng.choice(("he", "she"))
        cast[role] = pick_name(NAMES[gender])
        cast[kind] = pick(ANIMALS) if rng.random() < 0.4 else {"he": "boy", "she": "girl"}[gender]
        for pronoun, word in zip(("he", "his", "him"), PRONOUNS[gender]):
            cast[prefix + pronoun], cast[prefix + pronoun.capitalize()] = word, word.capitalize()
    while cast["friend"] == cast["hero"]:
        cast["friend"] = pick_name(NAMES[cast["fhe"]])
    cast["ehe"] = rng.choice(("he", "she"))
    cast["elder"] = pick(KIN[cast["ehe"]])
    cast["Number"] = cast["number"].capitalize()
    cast["fruits"], cast["animals"] = plural(cast["fruit"]), plural(pick(ANIMALS))
    cast["some food"] = f"some {cast['food']}"
    cast["hidden"] = pick(("under the bed", "behind the door", "inside a shoe", "below the stove", "behind the books"))
    for slot in SLOTS_WITH_ARTICLE:
        cast[f"a {slot}"] = f"{'an' if re.match('[aeiou]|hon|hour', cast[slot]) else 'a'} {cast[slot]}"
    return cast

def story(seed, number):
    """The story with this number, the same for the same seed: paragraphs of text."""
    rng = random.Random(seed * 1_000_003 + number)
    cast = draw_cast(rng)
    beginning, problem, end = PLOTS[int(rng.random() * len(PLOTS))]
    out = []
    # A friend who is met in the plot is not a friend yet; one who has no part in it takes no bow.
    plot = beginning + problem + end
    meets = mentions(plot, "friendkind") or mentions(plot, "a friendkind")
    openings = [opening for opening in OPENINGS if not (meets and mentions(opening, "friend"))]
    closings = [closing for closing in CLOSINGS if mentions(plot, "friend") or not mentions(closing, "friend")]
    for before, part in (("", openings[int(rng.random() * len(openings))]), (" ", beginning), ("\n\n", problem),
                         ("\n\n", end), (" ", closings[int(rng.random() * len(closings))])):
        out.append(before)
        expand(part, cast, rng, out)
    return "".join(out).rstrip()
